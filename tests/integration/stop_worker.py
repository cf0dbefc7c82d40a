"""Train in one of two processes of `torch.distributed.run`; a signal reaches the second alone, in step 3."""

from transformers import TrainerState

from tokmask_peft.cli import main
from tokmask_peft.training.callbacks import StopOnSignal

if __name__ == "__main__":
    at_end = StopOnSignal.on_step_end

    def on_step_end(self, args, state: TrainerState, control, **more):
        if state.global_step == 3 and args.process_index == 1:
            self.stopped = True
        return at_end(self, args, state, control, **more)

    StopOnSignal.on_step_end = on_step_end
    main()

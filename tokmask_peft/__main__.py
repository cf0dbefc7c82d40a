"""Run the command line as `python -m tokmask_peft`, as `accelerate launch` and `torchrun` do."""

from tokmask_peft.cli import main

if __name__ == "__main__":
    main()

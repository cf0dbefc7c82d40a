"""The sweeps of the masking study."""

from __future__ import annotations

from dataclasses import dataclass

RATES = ("--p", "0,0.1,0.2,0.3", "--seeds", "5")
REGULARIZERS = ("lora_dropout", "attention_dropout", "neftune", "label_smoothing")
COMBINED = [f"mask+{name}" for name in REGULARIZERS]
ARMS = ("--p", "0.1", "--seeds", "5", "--arms", ",".join(["none", *REGULARIZERS, "mask", *COMBINED]))
FEW = ("data.max_train=500", "training.epochs=10")
BESIDE = ("--p", "0.1", "--seeds", "3", "training.baseline=false")
PLAIN = (*BESIDE, "model.precision=fp32", "training.batching=padded")
TOP = (*BESIDE, "adapter.layers=0.5")
GROUPED = ("--p", "0", "--seeds", "3", "training.baseline=false", "training.batching=grouped")
SHORTER = ("training.epochs=6", "training.batch_size=32", "training.learning_rate=5e-4")


@dataclass(frozen=True, slots=True)
class Sweep:
    """One sweep: its name, the shipped recipe, and what follows it on the command line."""

    name: str
    recipe: str
    arguments: tuple[str, ...]

    @property
    def command(self) -> list[str]:
        """The arguments of `tokmask`."""
        return ["sweep", f"{self.recipe}/minilm", *self.arguments, "--name", self.name]


SWEEPS = (
    Sweep("trec", "trec", (*RATES, "training.epochs=4")),
    Sweep("trec-500", "trec", (*RATES, *FEW)),
    Sweep("trec-500-long", "trec", ("--p", "0,0.1,0.3", "--seeds", "3", "data.max_train=500", "training.epochs=30")),
    Sweep("mesent_mareng", "mesent_mareng", (*RATES, "training.epochs=2")),
    Sweep("afrisenti_twi", "afrisenti_twi", (*RATES, "training.epochs=4")),
    Sweep("afrisenti_twi-500", "afrisenti_twi", (*RATES, *FEW)),
    Sweep("ud_tur_deu_lid", "ud_tur_deu_lid", (*RATES, *SHORTER)),
    Sweep("ud_tur_deu_pos", "ud_tur_deu_pos", (*RATES, *SHORTER)),
    Sweep("ud_tur_deu_lid-tuned", "ud_tur_deu_lid", ("--p", "0,0.1,0.3", "--seeds", "3")),
    Sweep("ud_tur_deu_pos-tuned", "ud_tur_deu_pos", ("--p", "0,0.1,0.3", "--seeds", "3")),
    Sweep("trec-500-arms", "trec", (*ARMS, *FEW)),
    Sweep("afrisenti_twi-500-arms", "afrisenti_twi", (*ARMS, *FEW)),
    Sweep("trec-500-plain", "trec", (*PLAIN, *FEW)),
    Sweep("trec-500-top", "trec", (*TOP, *FEW)),
    Sweep("ud_tur_deu_lid-plain", "ud_tur_deu_lid", (*PLAIN, *SHORTER)),
    Sweep("ud_tur_deu_lid-top", "ud_tur_deu_lid", (*TOP, *SHORTER)),
    Sweep("ud_tur_deu_pos-tuned-plain", "ud_tur_deu_pos", PLAIN),
    Sweep("ud_tur_deu_pos-tuned-top", "ud_tur_deu_pos", TOP),
    Sweep("trec-500-grouped", "trec", (*GROUPED, *FEW)),
    Sweep("afrisenti_twi-grouped", "afrisenti_twi", (*GROUPED, "training.epochs=4")),
    Sweep("mesent_mareng-grouped", "mesent_mareng", (*GROUPED, "training.epochs=2")),
)

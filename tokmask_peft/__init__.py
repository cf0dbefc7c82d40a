"""Token-masked LoRA and QLoRA fine-tuning for text classification."""

__version__ = "0.1.0"

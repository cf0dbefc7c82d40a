"""What goes to the Hugging Face Hub: the model card, and the push of an adapter or a merged model."""

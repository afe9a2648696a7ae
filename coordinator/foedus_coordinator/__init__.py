"""The service that plans rounds, sums what organisations send, and publishes variants. It never loads the model."""

"""Models on disk: Hugging Face, GGUF and ONNX, and parity between any two."""

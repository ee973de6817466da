"""The vLLM versions that the seams were read against."""

SUPPORTED_VLLM = ("0.32.0",)

"""The vLLM versions that polyhelm's tests pass on. Another one is warned about; it is refused only if a check fails."""

SUPPORTED_VLLM = ("0.31.0", "0.32.0")

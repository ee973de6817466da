"""The knowledge base: facts in one language, found by questions in another. Imports neither vllm nor fastapi."""

"""vLLM as a generator: on servers, or in this process. Imported only when used."""

"""OpenAI's face: request schemas, pure translation, sync and streamed answers."""

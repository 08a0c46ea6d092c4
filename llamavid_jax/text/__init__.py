"""Conversations and tokenizers: from messages to ids, and from ids back to text.  No JAX."""

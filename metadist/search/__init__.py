"""Architecture search with distilled data: spaces of architectures, cheap judgements of them, and what those are worth."""

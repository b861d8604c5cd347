"""Other ways to schedule the same conversations, run through the same SDK, broker and engines."""

"""Tool calls in chat: their fields in a request, the forms in which models write them, OpenAI's form."""

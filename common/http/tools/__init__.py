"""Tool calls in chat: what a request says of them, how models write them, and OpenAI's form."""

"""What no chapter teaches, shared by all fifteen engines: checkpoints, tokenizer, protocol, tools."""

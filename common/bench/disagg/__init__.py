"""`disagg`: streams that decode while long prompts come in: one engine, or prefill apart from decode."""

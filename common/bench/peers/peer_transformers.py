"""transformers' `generate`: one batch, padded on the left, with an attention mask."""

from typing import Any

from peer_protocol import Generate, has_weights, main


def start(job: dict[str, Any]) -> tuple[Generate, str]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.set_num_threads(job["threads"])
    dtype, device = getattr(torch, job["dtype"]), torch.device(job["device"])
    if has_weights(job):
        model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype)
    else:
        config = AutoConfig.from_pretrained(job["model"])
        with device:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model = model.to(device).eval()

    @torch.inference_mode()
    def generate(prompts: list[list[int]], max_tokens: list[int]) -> list[list[int]]:
        longest, most = max(map(len, prompts)), max(max_tokens)
        input_ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask = torch.zeros_like(input_ids)
        for row, prompt in enumerate(prompts):
            input_ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        output = model.generate(
            input_ids=input_ids.to(device),
            attention_mask=mask.to(device),
            do_sample=False,
            max_new_tokens=most,
            eos_token_id=None,
            pad_token_id=0,
        )
        rows = output[:, longest:].tolist()
        return [row[:count] for row, count in zip(rows, max_tokens, strict=True)]

    return generate, job["dtype"]


if __name__ == "__main__":
    main("transformers", start)

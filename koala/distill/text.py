"""Captions as SDXL's U-Net takes them, and the unconditional input that the pipeline itself uses."""

from collections.abc import Sequence

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor, nn


class TextConditioner(nn.Module):
    """The teacher's two text encoders, frozen."""

    def __init__(self, pipeline: StableDiffusionXLPipeline) -> None:
        """Freeze the encoders of a pipeline."""
        super().__init__()
        self.encoders = nn.ModuleList([pipeline.text_encoder, pipeline.text_encoder_2]).requires_grad_(False)
        self.tokenizers = (pipeline.tokenizer, pipeline.tokenizer_2)
        self.zeros_when_empty = bool(pipeline.config.force_zeros_for_empty_prompt)

    def tokenize(self, captions: Sequence[str]) -> Tensor:
        """Return the token ids of both tokenizers: B x 2 x T."""
        ids = [
            tokenizer(
                list(captions),
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            ).input_ids
            for tokenizer in self.tokenizers
        ]
        return torch.stack(ids, dim=1)

    @torch.no_grad()
    def forward(self, tokens: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """Return penultimate states of both encoders, B x T x (W1 + W2), and the pooled output of the second, B x W2.

        `tokens` is B x 2 x T. Where `keep` (B, bool) is False, the unconditional input stands in for the caption: zeros, or the
        empty prompt, whichever the teacher's pipeline uses.
        """
        if not self.zeros_when_empty:
            empty = self.tokenize([""]).to(tokens.device)
            tokens = torch.where(keep[:, None, None], tokens, empty)
        outputs = [encoder(tokens[:, n], output_hidden_states=True) for n, encoder in enumerate(self.encoders)]
        states = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        pooled = outputs[1].text_embeds
        if self.zeros_when_empty:
            states, pooled = states * keep[:, None, None], pooled * keep[:, None]
        return states, pooled

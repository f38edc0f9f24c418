"""A captioner of BLIP's class, tiny and random."""

from pathlib import Path

LAYERS = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = LAYERS | {"image_size": 32, "patch_size": 16}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "a", "red", "blue", "circle", "square", "fox", "snow"]


def blip(folder: Path, teacher: Path) -> None:
    from transformers import (
        BertTokenizerFast,
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessor,
        BlipProcessor,
    )

    (folder / "vocab.txt").write_text("\n".join(WORDS))
    text = LAYERS | {
        "vocab_size": len(WORDS),
        "encoder_hidden_size": 16,
        "bos_token_id": 5,
        "pad_token_id": 0,
        "sep_token_id": 3,
        "max_position_embeddings": 64,
    }
    model = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=VISION))
    model.text_decoder.cls.predictions.decoder.weight.data.mul_(20)  # captions that differ
    model.save_pretrained(folder)
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"), bos_token="[DEC]")
    BlipProcessor(BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)

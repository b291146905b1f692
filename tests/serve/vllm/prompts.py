"""Prompts of mixed lengths, as token ids by name: text for an exported model, random tokens for a tiny one."""

from pathlib import Path

import torch

ROOT = Path(__file__).parents[3]
Prompts = dict[str, list[int]]


def text_prompts(folder: Path, longest: int) -> Prompts:
    """Beginnings of the documentation's sections, and ends of one page that are read after the same pages."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    found: Prompts = {}
    for page in sorted((ROOT / "docs").glob("*.md")):
        for section in page.read_text().split("\n## ")[1:4]:
            length = (3, 5, 9, 12, 20, 33, 40, 64, 65, 90)[len(found) % 10]
            ids = tokenizer(section, add_special_tokens=False).input_ids[:length]
            if len(ids) == length and len(found) < 48:
                found[f"{page.name}, {section.splitlines()[0]}, {length} tokens"] = ids
    page = tokenizer((ROOT / "docs/long_context.md").read_text(), add_special_tokens=False).input_ids
    prefix = page[: longest - 900]
    return found | {f"after {len(prefix)} tokens, {n} more": prefix + page[-n - 20 : -20] for n in (4, 50)}


def random_prompts() -> Prompts:
    """Twenty of random tokens, five of which begin alike."""
    generator = torch.Generator().manual_seed(2)
    prefix = torch.randint(3, 255, (160,), generator=generator).tolist()
    lengths = (1, 2, 5, 9, 17, 33, 40, 64, 65, 100, 128, 150, 200, 257, 300)
    unlike = [torch.randint(3, 255, (length,), generator=generator).tolist() for length in lengths]
    unlike += [prefix + tail[:20] for tail in unlike[4:9]]
    return {f"{i}, {len(prompt)} tokens": prompt for i, prompt in enumerate(unlike)}

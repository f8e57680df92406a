"""`python -m bench.generate results/x CELL --prompt "…"`: continue a text with the model that a cell kept.

Shapes: T tokens so far, V vocabulary.

The text goes to standard output as it is generated. At the end, a line on standard error compares the logits
of the steps with those of one parallel pass over the same tokens.
"""

from __future__ import annotations

import argparse
import codecs
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench.corpora import CorpusError
from bench.measure.predict import build_model
from bench.model.decode import Decoder, no_decoding
from bench.model.language_model import LanguageModel
from bench.run.code_hash import code_sha256
from bench.tasks.text import Text
from bench.tasks.text_config import TextConfig
from bench.train.kept_model import KeptModel, ModelError, find, load
from variants.safe_output import run


class TextModel:
    """A kept model, and the tokens of its data."""

    def __init__(self, kept: KeptModel) -> None:
        """Raises ModelError if the model was trained by other code or cannot be decoded, CorpusError if its
        data are not available."""
        spec = kept.spec
        now = code_sha256(*spec.variants(), modules=tuple(spec.slot_modules()))
        if now != kept.code_sha256:
            raise ModelError(
                f"the model was trained by other code ({kept.code_sha256}, here {now}); train it again"
            )
        make, config, setting = spec.task()
        if not (issubclass(make, Text) and isinstance(config, TextConfig)):
            raise ModelError(f"data={spec.data.name}: the model was not trained on text")
        task = make(config, setting)
        self.tokenizer, self.seq_len = task.tokenizer, spec.seq_len
        self.model: LanguageModel = build_model(spec).eval()
        self.model.load_state_dict(kept.weights)
        if not spec.causal:
            raise ModelError("a model that reads later tokens cannot be decoded")
        if reason := no_decoding(self.model):
            raise ModelError(reason)
        self.vocabulary = config.vocabulary

    def encode(self, text: str) -> Tensor:
        """The tokens (T,) of a text. Raises ModelError for none."""
        if not text:
            raise ModelError("--prompt is empty: allowed is a text of one character or more")
        content = np.frombuffer(text.encode(), dtype=np.uint8)
        ids = content if self.tokenizer is None else self.tokenizer.encode(content).ids
        return torch.from_numpy(np.array(ids, dtype=np.int64))

    def decode(self, token: int) -> bytes:
        """The bytes of a token; none for one that stands for no bytes."""
        if self.tokenizer is None:
            return bytes([token]) if token < 256 else b""
        return self.tokenizer.bytes_of_ids.decode(np.array([token])).tobytes()

    def run(
        self, prompt: Tensor, tokens: int, *, max_len: int, temperature: float, seed: int
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield so many tokens after the prompt (T,), each with the logits (V,) that it was chosen by.

        The most probable token with temperature 0, else a random one. Raises ModelError without room.
        """
        if len(prompt) + tokens > max_len:
            raise ModelError(
                f"a prompt of {len(prompt)} tokens and --tokens {tokens}: allowed are {max_len} together; "
                "give --max-len to go beyond the length that the model was trained on"
            )
        decoder = Decoder(self.model, 1, max_len)
        source = torch.Generator().manual_seed(seed)
        logits = decoder.read(prompt[None])[0]
        for _ in range(tokens):
            allowed = logits[: self.vocabulary]  # rows beyond it were never trained
            if temperature:
                chances = (allowed / temperature).softmax(-1)
                token = int(torch.multinomial(chances, 1, generator=source))
            else:
                token = int(allowed.argmax())
            yield token, logits
            logits = decoder.read(torch.tensor([[token]]))[0]

    @torch.no_grad()
    def parallel(self, tokens: Tensor) -> Tensor:
        """The logits (T, V) of one pass over tokens (T,)."""
        return torch.cat([out.logits for _, out in self.model.stream(tokens[None], causal=True)], dim=1)[0]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    description = (__doc__ or "").partition("\n\n")[0]
    parser = argparse.ArgumentParser(prog="python -m bench.generate", description=description)
    parser.add_argument("folder", type=Path, help="the experiment, such as results/adhoc")
    parser.add_argument("cell", nargs="?", default="", help="the beginning of a cell id; not needed for one")
    parser.add_argument("--prompt", required=True, help="the text to continue")
    parser.add_argument("--tokens", type=int, default=200, help="how many tokens to generate (200)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): the most probable token")
    parser.add_argument("--seed", type=int, default=0, help="of random tokens (0)")
    parser.add_argument("--max-len", type=int, help="most tokens, with the prompt; the model's seq_len")
    given = parser.parse_args(arguments)
    for name, value, least in (("tokens", given.tokens, 1), ("temperature", given.temperature, 0)):
        if not value >= least:
            parser.error(f"--{name} {value}: allowed is {least} or more")
    try:
        model = TextModel(load(find(given.folder, given.cell)))
        prompt = model.encode(given.prompt)
        steps = model.run(
            prompt,
            given.tokens,
            max_len=given.max_len or model.seq_len,
            temperature=given.temperature,
            seed=given.seed,
        )
        chosen, logits = _write(model, given.prompt, steps)
    except (ModelError, CorpusError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    want = model.parallel(torch.cat([prompt, torch.tensor(chosen)]))[len(prompt) - 1 : -1]
    worst = (torch.stack(logits) - want).abs().max().item() / want.abs().max().item()
    print(f"steps and a parallel pass: logits differ by at most {worst:.1e} of the largest", file=sys.stderr)
    return 0


def _write(
    model: TextModel, prompt: str, steps: Iterator[tuple[int, Tensor]]
) -> tuple[list[int], list[Tensor]]:
    """Write the text as it is generated; return the tokens and their logits."""
    reader = codecs.getincrementaldecoder("utf-8")(errors="replace")
    chosen, logits = [], []
    first = prompt
    for token, before in steps:
        print(first + reader.decode(model.decode(token)), end="", flush=True)
        first = ""
        chosen.append(token)
        logits.append(before)
    print(reader.decode(b"", final=True))
    return chosen, logits


if __name__ == "__main__":
    run(main)

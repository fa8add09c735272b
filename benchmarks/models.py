"""Which chat templates have verdicts and sound boundaries, and which architectures are right.

    python benchmarks/models.py --write docs/models.md                    templates of trl
    python benchmarks/models.py --architectures --write docs/models.md    tiny models
    python benchmarks/models.py --templates DIR      any folder of *.jinja files

Each writes its own part of the document.
The templates are read from the package and are no part of this repository. Their tokenizers are
not in it: a small byte-level tokenizer stands in, with the special tokens that a template names.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from scir_cli.engine.chat import Chat, Unrenderable
from scir_cli.errors import ScirError

#: Texts that tokenizers spell as one special token
SPECIAL = re.compile(r"<\|[^|<>{}' ]+\|>|<｜[^｜<>{}' ]+｜>|<\|?/?[a-zA-Z_]+\|?>|\[/?[A-Z_]+\]")
#: Added tokens that are not special in the tokenizers of these models
WORDS = re.compile(r"</?(think|tool\w*|function\w*|parameter\w*)>")

#: Pre-tokenization of recent models: single digits, and line breaks with the spaces before them
PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

TEXT = (
    "user assistant system\n\nIs the answer A or B?\n\nIt is the answer B.\n\nfinal analysis think"
)
QUESTION = [{"role": "user", "content": "Is it A or B?"}]
ANSWER = "It is B."
MARKER = "# Chat templates"


@dataclass(frozen=True)
class Result:
    """What a template does under some variables.

    verdict: the text before the verdict that the generation prompt lacks; None: no verdict.
    removed: the text at the end of the generation prompt that is not before the verdict.
    refusal: why there is none. boundary: sound, or the reason for a drop. parts: content is a list.
    planted: special tokens inside text stay text. reasoning: the marker at its end; "": none.
    """

    template: str
    kwargs: dict[str, Any]
    verdict: str | None
    removed: str
    refusal: str
    boundary: str
    parts: bool
    planted: bool
    reasoning: str


def base_vocabulary() -> str:
    """A byte-level BPE with merged line breaks, as tokenizer.json text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    return tokenizer.to_str()


def make_chat(name: str, template: str, kwargs: dict[str, Any], vocabulary: str) -> Chat:
    """The template with a stand-in tokenizer; its end token is what the template writes last."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(vocabulary),
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        name_or_path=name,
    )
    spellings = sorted({found[0] for found in SPECIAL.finditer(template)})
    special = [text for text in spellings if not WORDS.fullmatch(text)]
    tokenizer.add_tokens(special, special_tokens=True)
    tokenizer.add_tokens([text for text in spellings if WORDS.fullmatch(text)])
    tokenizer.chat_template = template
    chat = Chat(tokenizer, frozenset({tokenizer.eos_token_id}), kwargs)
    try:
        answer = {"role": "assistant", "content": ANSWER}
        ids = chat.render([*QUESTION, answer], generation=False)
    except ScirError:
        return chat
    tail = SPECIAL.findall(tokenizer.decode(ids).rpartition(ANSWER)[2])
    last = [tokenizer.convert_tokens_to_ids(text) for text in tail if text in special][-1:]
    return Chat(tokenizer, frozenset({tokenizer.eos_token_id, *last}), kwargs)


def measure(name: str, template: str, kwargs: dict[str, Any], vocabulary: str) -> Result:
    """Verdict, boundary and planted special tokens of a template."""
    chat = make_chat(name, template, kwargs, vocabulary)
    verdict = None
    removed = ""
    refusal = ""
    try:
        answers = chat.verdicts(["A", "B"])
        chat.verdicts([str(score) for score in range(6)])
        verdict = chat.tokenizer.decode(answers.cue)
        prompt = chat.prompt_ids(QUESTION)
        removed = chat.tokenizer.decode(prompt[len(prompt) - answers.n_removed :])
    except ScirError as error:
        refusal = str(error)
    try:
        chat.labeled_ids(QUESTION, [ANSWER])
        boundary = "sound"
    except Unrenderable as error:
        boundary = error.reason
    except ScirError:
        boundary = "no conversation"
    parts = False
    planted = False
    reasoning = ""
    if verdict is not None:
        reasoning = chat.markers.end if chat.markers else ""
        parts = chat.reads_parts
        planted = planted_stays_text(chat)
    return Result(name, kwargs, verdict, removed, refusal, boundary, parts, planted, reasoning)


def planted_stays_text(chat: Chat) -> bool:
    """Whether every special token inside a question leaves the prompt's turns as they are."""
    specials = set(chat.encoder.special_ids.values())
    spelled = " ".join(chat.encoder.special_ids)
    prompts = []
    for content in ("A hill.", f"A hill. {spelled}"):
        ids = chat.prompt_ids([{"role": "user", "content": content}])
        prompts.append([token for token in ids if token in specials])
    return prompts[0] == prompts[1]


def templates_of(folder: Path | None) -> tuple[str, dict[str, str]]:
    """Where the templates are from, and name -> text of those that are not made for training."""
    source = f"templates of {folder}"
    if folder is None:
        spec = importlib.util.find_spec("trl")
        if spec is None or spec.origin is None:
            sys.exit("trl is not installed: pip install --no-deps trl, or pass --templates DIR")
        folder = Path(spec.origin).parent / "chat_templates"
        source = f"trl {importlib.metadata.version('trl')}"
    names = sorted(path for path in folder.glob("*.jinja") if not path.stem.endswith("_training"))
    return source, {path.stem: path.read_text(encoding="utf-8") for path in names}


def table(results: list[Result]) -> list[str]:
    """A Markdown row per template: as it is, and with enable_thinking=false if that differs."""
    by_name: dict[str, list[Result]] = {}
    for result in results:
        by_name.setdefault(result.template, []).append(result)
    lines = [
        "| template | verdict after | labeled answers | with `enable_thinking=false` | content "
        "| reasoning ends at |",
        "|---|---|---|---|---|---|",
    ]
    for name, (plain, quiet) in by_name.items():
        cells = [_verdict_cell(plain), plain.boundary]
        changed = (plain.verdict, plain.boundary) != (quiet.verdict, quiet.boundary)
        other = f"{_verdict_cell(quiet)}; {quiet.boundary}" if changed else "the same"
        content = "parts" if plain.parts else "text"
        end = f"`{_escaped(plain.reasoning)}`" if plain.reasoning else "–"
        lines.append(f"| {name} | {' | '.join(cells)} | {other} | {content} | {end} |")
    return lines


def _verdict_cell(result: Result) -> str:
    if result.verdict is None:
        return "refused"
    if result.removed and not result.verdict.startswith(result.removed):
        start = f"the prompt without `{_escaped(result.removed)}`"
        return f"{start}, and `{_escaped(result.verdict)}`" if result.verdict else start
    return f"`{_escaped(result.verdict)}`" if result.verdict else "the prompt"


def _escaped(text: str) -> str:
    """A text in one line of a Markdown table."""
    return json.dumps(text, ensure_ascii=False).strip('"').replace("|", "\\|")


def document(source: str, results: list[Result]) -> str:
    """docs/models.md."""
    plain = [result for result in results if not result.kwargs]
    quiet = [result for result in results if result.kwargs]
    found = sum(result.verdict is not None for result in plain)
    sound = sum(result.boundary == "sound" for result in plain)
    sound_quiet = sum(result.boundary == "sound" for result in quiet)
    either = sum("sound" in (a.boundary, b.boundary) for a, b in zip(plain, quiet, strict=True))
    planted = sum(result.planted for result in plain)
    reasoning = sum(bool(result.reasoning) for result in plain)
    refused = [f"- {result.template}: {result.refusal}" for result in plain if result.refusal]
    lines = [
        MARKER,
        "",
        f"Made by `python benchmarks/models.py --write docs/models.md` from {source}, "
        f"{len(plain)} templates, with a stand-in tokenizer.",
        "",
        f"- Verdicts (A/B and 0 to 5) at one token: {found} of {len(plain)}.",
        f"- Labeled answers separate from their prompts: {sound} of {len(plain)}; "
        f"{sound_quiet} with `--chat-template-kwargs enable_thinking=false`, "
        f"{either} with one of the two.",
        f"- Special tokens inside text are encoded as text: {planted} of {found}.",
        f"- A marker ends the reasoning of an answer: {reasoning} of {found}.",
        "",
        "*Verdict after* is the text between the generation prompt and the verdict. It becomes "
        "part of the judge's prompt, and of the prompt of labeled answers.",
        "*Labeled answers* without token ids are dropped and counted under the name in that "
        "column unless it is `sound`.",
        "*Content* is how the template reads a message: as text, or as a list of parts.",
        "*Reasoning ends at* is the marker after which judges read an answer; `--think-end` names "
        "another.",
        "",
        *table(results),
    ]
    if refused:
        lines += ["", "Refused:", "", *refused]
    return "\n".join(lines) + "\n"


def write_part(path: Path, text: str, *, first: bool) -> None:
    """Replaces one of the two parts of the document, which start with headings of level one."""
    old = path.read_text(encoding="utf-8") if path.is_file() else ""
    templates, heading, models_ = old.partition("# Architectures\n")
    other = heading + models_ if first else templates
    parts = [text, other] if first else [other, text]
    joined = "\n\n".join(part.strip() for part in parts if part.strip())
    path.write_text(joined + "\n", encoding="utf-8")


def main_of_architectures(arguments: argparse.Namespace) -> None:
    """Measures the named architectures, or all of them."""
    import architectures

    names = arguments.architectures or [*architectures.ARCHITECTURES, *architectures.WRAPPERS]
    rows = [architectures.measure(name) for name in names]
    if arguments.json:
        text = json.dumps([asdict(row) for row in rows], indent=1)
        arguments.json.write_text(text, encoding="utf-8")
    if arguments.write:
        write_part(arguments.write, "\n".join(architectures.document(rows)), first=False)
    print("\n".join(architectures.table(rows)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--templates", type=Path, help="folder of *.jinja files")
    parser.add_argument("--write", type=Path, help="Markdown file to write")
    parser.add_argument("--json", type=Path, help="file for all results")
    parser.add_argument("--architectures", nargs="*", metavar="NAME", help="some, or all of them")
    arguments = parser.parse_args()
    if arguments.architectures is not None:
        main_of_architectures(arguments)
        return
    source, templates = templates_of(arguments.templates)
    vocabulary = base_vocabulary()
    results = []
    for name, template in templates.items():
        for kwargs in ({}, {"enable_thinking": False}):
            results.append(measure(name, template, kwargs, vocabulary))
    if arguments.json:
        rows = [asdict(result) for result in results]
        arguments.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    if arguments.write:
        write_part(arguments.write, document(source, results), first=True)
    print("\n".join(table(results)))


if __name__ == "__main__":
    main()

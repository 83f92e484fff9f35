"""Samples turned into tokens: the chat template, padding, the loss mask.

Worked example, a record of VQACL's release and its tokens for LLaVA-1.5: [..] is in the loss,
_.._ are the question rows; the instruction is neither.
  {"img_id": "COCO_train2014_000000458752", "question_id": 458752000, "label": {"net": 1},
   "sent": "What is this photo taken looking through?", ...}
  <s>USER: <image> x 576 \n _What is this photo taken looking through?_ \n Answer the question using
  a single word or phrase. ASSISTANT:[ net</s>]
"""

from functools import cache

import torch

from benchmarks import Sample
from files import InputError


@cache
def template(processor, chat_template, image: bool, system: str) -> tuple[str, str, str, str]:
    """The model's chat template, as the texts before the question, between question and answer,
    from the answer on, and from an answer to the next question: rendered with private-use
    characters in their places, so that no question can be mistaken for template text."""
    q, a = "\ue000", "\ue001"

    def said(role: str, text: str, image: bool = False) -> dict:
        content = [{"type": "image"}] * image + [{"type": "text", "text": text}]
        return {"role": role, "content": content}

    talk = [said("system", system)] * bool(system) + [said("user", q, image)]
    reply = [said("assistant", a), said("user", q)]
    try:
        before, between = processor.apply_chat_template(talk, add_generation_prompt=True).split(q)
        gap, after = processor.apply_chat_template(talk + reply[:1]).split(q)[1].split(a)
        turn = processor.apply_chat_template(talk + reply).split(a)[1].split(q)[0]
        if (before + between).count(processor.image_token) != image:
            raise ValueError("image tokens")
    except Exception:  # no template, one that refuses a role, or a text that cannot be split so
        raise InputError(
            "the model needs a chat template (chat_template.jinja in its folder) that shows one "
            f"question, one answer and one {processor.image_token} per image"
        ) from None
    # What stands before the answer is what generation will see. A blank that only the full talk has
    # ("ASSISTANT: net" against "ASSISTANT:") belongs to the answer: the model must produce it.
    gap = gap.removeprefix(between) if gap.startswith(between) else ""
    eos = processor.tokenizer.eos_token
    after = after.strip()  # LLaVA-1.5: "" (the template forgets </s>); ChatML: <|im_end|>
    after = after if eos in after else after + eos
    turn = turn.lstrip().removeprefix(after)
    return before, between, gap + a + after, turn


def build_prompt(processor, question, answer=None, image=True, system="", further=()):
    """(text, (question start, question end), [(answer start, answer end)]) in characters; <image>
    stands once.

    Without an answer, text is the prompt for generation and ends at `answer start`. With one,
    text[start:end] is the answer with its leading blank and end marks: exactly what the model must
    produce after the prompt, and what is in the loss. further: later turns (question, answer)."""
    turns = [(question, answer), *further]
    if any(processor.image_token in asked for asked, _ in turns):
        raise InputError(f"a question must not contain {processor.image_token}: {question!r}")
    before, between, ending, turn = template(processor, processor.chat_template, image, system)
    text, spans = before + question + between, []
    if answer is None:
        return text, (len(before), len(before) + len(question)), [(len(text), len(text))]
    for k, (asked, said) in enumerate(turns):
        text += turn + asked + between if k else ""
        spans.append((len(text), len(text) + len(ending.replace("\ue001", said))))
        text += ending.replace("\ue001", said)
    return text, (len(before), len(before) + len(question)), spans


class Collator:
    """Samples -> one batch of tensors [B, S]: input_ids, attention_mask, image_mask, question_mask
    (bool; the question without the stream's suffix) and, for training, labels (-100 except on the
    answers and their end-of-sequence). `question_offsets`: per sample [(column, start, end)],
    characters of the (first) question. system: a sentence before every conversation. Training pads
    right; generation gets prompts only, padded LEFT."""

    def __init__(self, processor, image_tokens: int, system: str = ""):
        self.processor, self.image_tokens, self.system = processor, image_tokens, system
        self.tokenizer = processor.tokenizer
        self.image_id = self.tokenizer.convert_tokens_to_ids(processor.image_token)
        if not getattr(self.tokenizer, "is_fast", False):
            raise InputError("the model has no fast tokenizer (tokenizer.json) to give offsets")

    def text(self, sample: Sample, train: bool) -> tuple[str, int, int, list]:
        """(text with P image tokens, question start, question end, answers' [(start, end)])."""
        answer, mark = sample.answer if train else None, self.processor.image_token
        about = sample.image is not None, self.system, sample.further
        text, (start, _), spans = build_prompt(self.processor, sample.question, answer, *about)
        if sample.image:  # one mark becomes P marks, and everything behind it moves
            shift = len(mark) * (self.image_tokens - 1)
            start += shift * (start > text.index(mark))
            spans = [(first + shift, last + shift) for first, last in spans]
            text = text.replace(mark, mark * self.image_tokens, 1)
        asked = sample.question.removesuffix(sample.suffix).rstrip()
        return text, start, start + len(asked), spans

    def __call__(self, samples: list[Sample], train: bool) -> dict:
        tokenizer = self.tokenizer
        texts, *spans = zip(*[self.text(sample, train) for sample in samples])
        bos = tokenizer.bos_token
        doubled = bool(bos) and texts[0].startswith(bos)  # a template may have written it already
        coded = tokenizer(list(texts), add_special_tokens=not doubled, return_offsets_mapping=True)
        size = len(samples), max(len(ids) for ids in coded["input_ids"])
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        ids, labels = torch.full(size, pad), torch.full(size, -100)  # [B, S]
        attention, question = torch.zeros(size, dtype=torch.long), torch.zeros(size).bool()
        question_offsets = []
        for b, (sample, start, end, targets) in enumerate(zip(samples, *spans)):
            row, offsets = torch.tensor(coded["input_ids"][b]), coded["offset_mapping"][b]
            first = 0 if train else size[1] - len(row)
            ids[b, first : first + len(row)] = row
            attention[b, first : first + len(row)] = 1
            marks = int((row == self.image_id).sum())
            wanted = self.image_tokens if sample.image else 0
            assert marks == wanted, f"sample {sample.id}: {marks} image tokens, not {wanted}"
            inside = [(max(x - start, 0), min(y, end) - start) for x, y in offsets]
            asked = [i for i, (x, y) in enumerate(offsets) if x < end and y > start]
            question[b, [first + i for i in asked]] = True
            question_offsets.append([(first + i, *inside[i]) for i in asked])
            if train:
                # A token is in the loss if it ends behind the prompt, so a lone blank before a
                # digit counts too. Marks added by the tokenizer (<s>) have the empty span (0, 0).
                ends = [any(first < y <= last for first, last in targets) for _, y in offsets]
                answer = torch.tensor(ends)
                assert answer.sum() > 1, f"sample {sample.id}: {answer.sum()} tokens are answer"
                labels[b, : len(row)][answer] = row[answer]
        batch = {"input_ids": ids, "attention_mask": attention, "question_mask": question}
        batch |= {"image_mask": (ids == self.image_id) & (attention == 1)}
        batch |= {"labels": labels} if train else {}
        return batch | {"question_offsets": question_offsets}

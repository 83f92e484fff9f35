"""MR-LoRA: independent experts, routed answers, the router's prompt, and whole runs."""

import json
import re
import shutil
import types

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_scripts import kill_after, run_here

import data
import eval as evaluation
import mini
import mllm_cl
from data import Collator
from eval import score
from model import add_lora, image_tokens

ROUTER = "--router_epochs 2 --shots 3 --router_batch 4 --targets q,v,projector --rank 4".split()


@pytest.fixture(scope="module")
def flags(flags, stream_folder, tmp_path_factory):
    """The shared flags, on a copy of the stream whose stages have descriptions."""
    folder = tmp_path_factory.mktemp("described") / "stream"
    shutil.copytree(stream_folder, folder)
    spec = {"stages": ["one", "two", "three"]}
    spec["descriptions"] = {name: f"pictures of kind {name}" for name in spec["stages"]}
    (folder / "stream.json").write_text(json.dumps(spec))
    changed = [str(folder) if flag == str(stream_folder) else flag for flag in flags]
    return [*changed, *ROUTER]


@pytest.fixture(scope="module")
def mllm_run(flags, tmp_path_factory):
    return run_here("mllm_cl", flags, tmp_path_factory.mktemp("run") / "mllm")


def expert(run, stage):
    return (run / "experts" / stage / "adapter_model.safetensors").read_bytes()


def results(run):
    files = ["matrix.json", "routing.jsonl", "router/adapter_model.safetensors"]
    files += [f"predictions/{p.name}" for p in sorted((run / "predictions").iterdir())]
    return {name: (run / name).read_bytes() for name in files}


def test_a_run_leaves_its_records_and_figures(mllm_run):
    summary = json.loads((mllm_run / "summary.json").read_text())
    assert np.array(summary["confusion"]).sum((1, 2)).tolist() == [5, 10, 15]
    assert summary["cost"]["router_passes"] == 25  # none while there is one expert
    lines = [json.loads(line) for line in (mllm_run / "routing.jsonl").read_text().splitlines()]
    asked = {(line["task"], line["question_id"], line["choice"]) for line in lines}
    assert summary["cost"]["generations"] == len(asked) < 30  # no answer is generated twice
    assert summary["tower_runs"] == 3 * 17 - 2
    assert len(lines) == 30
    assert all(abs(sum(line["probabilities"]) - 1) < 1e-3 for line in lines)
    assert evaluation.rescore(mllm_run) == []
    names = {path.name for path in (mllm_run / "figures").iterdir()}
    assert names == {"cases.png", "confusion.png", "matrix.png", "parameters.png", "routers.png"}


def test_experts_do_not_depend_on_the_order_of_the_tasks(mllm_run, flags, tmp_path):
    run = run_here("mllm_cl", [*flags, "--order", "reverse", "--router", "oracle"], tmp_path / "r")
    for stage in ("one", "two", "three"):
        assert expert(run, stage) == expert(mllm_run, stage)
    matrix = np.array(json.loads((run / "matrix.json").read_text())["matrix"], dtype=float)
    for i in range(3):  # no expert changes, and the oracle always asks the same one
        assert len(set(matrix[i:, i])) == 1
    mllm_cl.plot([mllm_run, run], tmp_path / "figures")


def test_the_routed_answer_is_the_chosen_experts_own(flags, tmp_path, monkeypatch):
    """Whatever the router chooses, that expert answers, as it does alone. And the router learns
    from the kept training samples of the tasks seen so far, and from nothing else."""
    count_checked, seen = [], {}
    route, answer_all, train = mllm_cl.route, mllm_cl.answer_all, mllm_cl.train

    def wrong_route(m, processor, cache, collator, samples, t, *rest):
        probability, choice, failures = route(m, processor, cache, collator, samples, t, *rest)
        return probability, [(k + 1) % (t + 1) for k in range(len(choice))], failures

    def spy_answers(m, processor, cache, collator, samples, choice, stages, args, answers):
        count = answer_all(m, processor, cache, collator, samples, choice, stages, args, answers)
        for sample, k in zip(samples, choice, strict=True):  # each alone, by the adapter itself
            mllm_cl.use(m, f"expert-{stages[k].name}")
            batch = collator([sample], train=False)
            images = mllm_cl.image_features(cache, [sample])
            (text,) = mllm_cl.generate(m, processor, batch, images, args.max_new_tokens)
            count_checked.append(answers[id(sample), k] == text)
        return count

    def spy_train(m, parameters, samples, *rest, **more):
        seen[rest[7]] = samples  # by the title
        return train(m, parameters, samples, *rest, **more)

    monkeypatch.setattr(mllm_cl, "route", wrong_route)
    monkeypatch.setattr(mllm_cl, "answer_all", spy_answers)
    monkeypatch.setattr(mllm_cl, "train", spy_train)
    run = run_here("mllm_cl", [*flags, "--shots", "4"], tmp_path / "run")
    lines = [json.loads(line) for line in (run / "routing.jsonl").read_text().splitlines()]
    end = [line for line in lines if line["stage"] == 3 and line["task"] == 1]
    assert [line["choice"] for line in end] == [2, 3, 1, 2, 3]
    assert count_checked == [True] * 30
    for t, name in ((1, "two"), (2, "three")):
        asked = seen[f"stage {t + 1}/3 {name} router"]
        assert len(asked) == 2 * 4 * (t + 1) and {s.stage for s in asked} <= {"one", "two", name}
        names = [s.image.name for s in asked if s.image]
        assert names and all(name.startswith("train") for name in names)
        assert all(s.image is None for s in asked[len(asked) // 2 :])  # --blind_shots


def test_the_router_sees_no_test_data_and_no_suffix(flags):
    args = mllm_cl.parse(flags)
    stream = data.load_stream(data.resolve_defaults(args))
    stage = stream.stages[0]
    kept = mllm_cl.shots_of(stage, 3, 0)
    assert len(kept) == 3 and all(any(s is x for x in stage.train) for s in kept)
    assert mllm_cl.shots_of(stage, 99, 0) != [] and len(mllm_cl.shots_of(stage, 99, 0)) == 12
    kept[0].question, kept[0].suffix = "how many?\nOne word.", "One word."
    (asked,) = mllm_cl.router_samples(kept[:1], [1], ["signs", "maps"], ["B", "A"])
    assert asked.answer == "A" and "One word" not in asked.question
    lines = asked.question.split("\n")
    assert lines[1:] == ["A. maps", "B. signs", "Question: how many?", "Give the letter only."]


@pytest.mark.parametrize("row", data.STREAMS.values(), ids=data.STREAMS)
def test_every_stream_can_be_routed(row):
    assert list(row.descriptions) == list(row.stages)
    assert len(set(row.descriptions.values())) == len(row.stages)


def test_letters_are_told_apart(tiny, samples):
    model, processor = tiny
    collator = Collator(processor, image_tokens(model, processor))
    ids, place = mllm_cl.letter_ids(collator, samples[0], list("ABCDE"))
    assert len(set(ids)) == 5 and place == 1  # here the blank before the letter is a token
    assert sorted(mllm_cl.letters_of(5, 3)) == list("ABCDE") != mllm_cl.letters_of(5, 3)


@pytest.mark.parametrize(
    ("text", "wanted", "failed"),
    [("B", 1, 0), (" B. ", 1, 0), ("(B", 1, 0), ("BA", 0, 0), ("b", 0, 1), ("C", 0, 1),
     ("(B)", 0, 1), ("B is best", 0, 1), ("", 0, 1)],
)  # fmt: skip
def test_texts_of_the_generating_router(text, wanted, failed, monkeypatch, tiny, samples):
    """Up to one other character beside letters is overlooked, as published; all else is counted,
    and the letter with the highest logit taken."""
    model, processor = tiny
    letters = ["A", "B"]
    stream = types.SimpleNamespace(
        stages=[types.SimpleNamespace(name=n) for n in "xy"], descriptions={"x": "u", "y": "v"}
    )
    args = types.SimpleNamespace(router="generate", eval_batch_size=2)
    collator = Collator(processor, image_tokens(model, processor))
    monkeypatch.setattr(mllm_cl, "generate", lambda *_: [text])
    monkeypatch.setattr(mllm_cl, "letter_logits", lambda *_: torch.tensor([[1.0, 0.0]]))
    monkeypatch.setattr(mllm_cl, "image_features", lambda *_: None)
    _, choice, failures = mllm_cl.route(
        model, processor, None, collator, samples[:1], 1, args, stream, letters, []
    )
    assert choice == [wanted] and failures == failed


# killed in an expert, in the router of stage 2, and when that router is done
@pytest.mark.parametrize("lines", [9, 14, 16])
def test_killed_and_resumed_gives_the_same_bytes(lines, mllm_run, flags, tmp_path):
    run, more = tmp_path / "killed", ["--save_every", "1"]
    kill_after(lines, "mllm_cl", [*flags, *more], run)
    with open(run / "routing.jsonl", "a") as file:
        file.write('{"stage": 1, "ta')  # what a kill may leave of a line
    run_here("mllm_cl", [*flags, *more, "--resume"], run)
    assert results(run) == results(mllm_run)
    costs = [evaluation.read_json(path / "summary.json")["cost"] for path in (run, mllm_run)]
    assert costs[0] == costs[1]


def test_every_shot_is_seen_with_and_without_its_image():
    steps = mllm_cl.router_steps(10, 4, 3, "0/1", blind=True)
    passes = [sum(steps[k : k + 4], []) for k in range(0, 16, 4)]
    assert [len(step) for step in steps] == [3, 3, 3, 1] * 4
    for one, next_one in zip(passes, passes[1:], strict=False):
        assert sorted(one + next_one) == list(range(20))
        assert sum(i >= 10 for i in one) == 5  # both kinds in every pass
    assert max(map(max, mllm_cl.router_steps(10, 4, 3, "0/1", blind=False))) == 9


@pytest.mark.parametrize("more", ["--router generate", "--router prototype --accumulate 2",
                                  "--gradient_checkpointing --dtype bf16 --shots 50"])  # fmt: skip
def test_every_router_runs(more, flags, tmp_path):
    run = run_here("mllm_cl", [*flags, *more.split(), "--limit", "4"], tmp_path / "run")
    summary = json.loads((run / "summary.json").read_text())
    assert 0 <= summary["routing_accuracy"][-1] <= 100
    router = (run / "router").exists()
    assert router == ("prototype" not in more)


def test_experts_of_another_run_give_the_same_bytes(mllm_run, flags, tmp_path):
    run = run_here("mllm_cl", [*flags, "--experts", str(mllm_run)], tmp_path / "run")
    assert results(run) == results(mllm_run)
    parts = json.loads((run / "summary.json").read_text())["seconds_by_part"]
    was = json.loads((mllm_run / "summary.json").read_text())["seconds_by_part"]
    assert parts["expert"] == was["expert"]  # what they cost is not forgotten


def test_experts_of_another_run_must_fit(mllm_run, flags, tmp_path):
    for name, lost in (("unfinished", "summary.json"), ("partial", "experts/two")):
        shutil.copytree(mllm_run, tmp_path / name)
        (tmp_path / name / lost).rename(tmp_path / f"lost-{name}")
    shutil.copytree(mllm_run, tmp_path / "foreign")
    summary = evaluation.read_json(mllm_run / "summary.json") | {"model_sha256": "of another"}
    evaluation.write_json(tmp_path / "foreign" / "summary.json", summary)
    for more, sentence in (
        (["--lr", "0.123"], "--lr .* and now --lr is 0.123"),
        (["--experts", str(tmp_path)], "is no run folder"),
        (["--experts", str(tmp_path / "unfinished")], "is no finished run of mllm_cl.py"),
        (["--experts", str(tmp_path / "partial")], "experts/two is missing"),
        (["--experts", str(tmp_path / "foreign")], "belong to another model"),
    ):
        with pytest.raises(data.InputError, match=sentence):
            run_here("mllm_cl", [*flags, "--experts", str(mllm_run), *more], tmp_path / "run")


def test_an_expert_is_a_peft_adapter(mllm_run):
    state = load_file(mllm_run / "experts" / "one" / "adapter_model.safetensors")
    config = json.loads((mllm_run / "experts" / "one" / "adapter_config.json").read_text())
    assert config["r"] == 4 and all(key.startswith("base_model.model.") for key in state)


def test_bad_input(flags, stream_folder, tmp_path):
    plain = [str(stream_folder) if "described" in flag else flag for flag in flags]
    with pytest.raises(data.InputError, match="task one has no description"):
        run_here("mllm_cl", plain, tmp_path / "run")
    for wrong in ("--shots 0", "--router_lr -1", "--router_batch 0"):
        with pytest.raises(data.InputError, match=wrong.split()[0].removeprefix("--")):
            mllm_cl.parse(wrong.split())
    many = types.SimpleNamespace(stages=[types.SimpleNamespace(name=str(k)) for k in range(27)])
    with pytest.raises(data.InputError, match="27 tasks, but only 26 letters"):
        mllm_cl.check_stream(mllm_cl.parse(flags), many)


def test_a_task_with_few_samples_keeps_them_all_and_says_so(mllm_run, flags, capsys):
    args = data.resolve_defaults(mllm_cl.parse([*flags, "--shots", "13"]))
    mllm_cl.check_stream(args, data.load_stream(args))
    assert "one has 12 samples, fewer than --shots 13: all are kept" in capsys.readouterr().out


def test_a_run_stopped_just_before_its_end_can_be_finished(mllm_run, flags, tmp_path):
    run = shutil.copytree(mllm_run, tmp_path / "run")
    (run / "summary.json").unlink()  # all stages are done, the records are not written
    run_here("mllm_cl", [*flags, "--resume"], run)
    before, after = (evaluation.read_json(path / "summary.json") for path in (mllm_run, run))
    for key in ("matrix", "confusion", "cost", "stored_parameters", "routing_accuracy"):
        assert before[key] == after[key]


def test_published_rows_give_their_bwt():
    """MFN and BWT of the published tables follow from their rows."""
    for row, mft, mfn, bwt in (
        ([69.65, 41.59, 25.43, 40.88, 87.45], 64.98, 53.00, -14.97),
        ([80.87, 65.32, 54.12, 56.71, 91.12], 69.64, 69.63, -0.01),
        ([23.60, 33.70, 55.84, 32.50], 41.28, 36.41, -6.49),
        ([33.70, 36.20, 65.10, 32.50], 41.89, 41.88, -0.02),
    ):
        T = len(row)
        assert abs(np.mean(row) - mfn) < 0.01
        matrix = np.full((T, T), 0.0)  # any diagonal with this mean, ending in the last row's
        matrix[-1] = row
        rest = (mft * T - row[-1]) / (T - 1)
        matrix[range(T - 1), range(T - 1)] = rest
        values = evaluation.metrics(matrix)
        assert abs(values["MFT"] - mft) < 1e-9 and abs(values["MFN"] - mfn) < 0.01
        assert abs(values["BWT"] - bwt) < 0.015


@pytest.mark.parametrize(
    ("metric", "prediction", "answers", "facts", "wanted"),
    [
        ("word-in", "There are 3 houses.", ["3"], {}, 1),
        ("word-in", "There are 13. Houses", ["3"], {}, 1),  # followed by a period: the rule's quirk
        ("word-in", "13x houses", ["3"], {}, 0),
        ("word-in", "xno", ["no."], {}, 1),  # one word on both sides: anywhere
        ("word-in", "turn LEFT now", ["turn left"], {}, 1),
        ("gold-in", "unknown", ["no"], {}, 1),
        ("gold-in", "yes", ["no"], {}, 0),
        ("sci", "B", ["b"], {"image": "AI2D_1.png", "prompt": ""}, 1),
        ("sci", "b it is", ["b"], {"image": "TQA_1.png", "prompt": ""}, 0),
        ("sci", "b it is", ["b"], {"image": "map.png", "prompt": "which?"}, 1),
        ("sci", "Ohio, Iowa", ["Iowa, Utah"], {"image": "m.png", "prompt": "Which states?"}, 0.5),
        ("fin", "Yes.", ["yes"], {}, 1),
        ("fin", "yes it is", ["yes"], {}, 0),
        ("ocr", "it says STOP here", ["stop"], {"skill": "Scene Text"}, 1),
        ("ocr", "X ^ 2", ["X^2"], {"skill": "Handwritten Mathematical Expression Recognition"}, 1),
        ("ocr", "x ^ 2", ["X^2"], {"skill": "Handwritten Mathematical Expression Recognition"}, 0),
        ("math", "3 + 4 = 7", ["7"], {}, 1),
        ("math", "7 or 8", ["7"], {}, 0),
        ("math", "(B)", ["B"], {}, 1),
        ("math", "in 2021-2022", ["2022"], {}, 1),
        ("math", "it is -3", ["-3"], {}, 1),
        ("math", "B. seven", ["B"], {}, 1),
        ("math", "the answer is Monday", ["monday"], {}, 1),
        ("count", "There are 12.", ["1 2"], {}, 1),
    ],
)
def test_scorers_of_the_benchmark(metric, prediction, answers, facts, wanted):
    assert score(metric, prediction, answers, facts) == wanted


@pytest.mark.parametrize("folder", ["", "ability"])
def test_the_released_layout_of_acl(folder, tmp_path):
    """Folders as the release has them; OCRBench's answer_type reaches its scorer."""
    formula, parts = "Handwritten Mathematical Expression Recognition", {}
    for stage in ("OCR", "Math", "VP", "APP"):
        for split in ("train", "test"):
            home = tmp_path / folder / (stage if split == "train" else f"{stage}_test")
            (home / "images").mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(home / "images" / "0.png")
            record = {"question_id": 0, "image": "images/0.png", "text": "what?", "answer": "x^2"}
            if split == "train":
                said = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "x"}]
                record = {"id": 0, "image": "images/0.png", "conversations": said}
            elif stage == "OCR":
                record["answer_type"] = formula
            (home / f"{split}.json").write_text(json.dumps([record]))
    args = mllm_cl.parse(["--stream", "acl", "--data", str(tmp_path)])
    stream = data.load_stream(data.resolve_defaults(args))
    for stage in stream.stages:
        parts[stage.name] = stage.test[0].skill
        assert stage.test[0].image.parent.parent.name == f"{stage.name}_test"
    assert parts == {"OCR": formula, "Math": "Math", "VP": "VP", "APP": "APP"}
    ocr = stream.stages[0]
    rows = evaluation.evaluate(lambda samples: ["x ^ 2"] * len(samples), ocr.test, ocr.metric, 4)
    assert rows[0]["score"] == 1


@pytest.mark.parametrize("task", mini.TASKS["acl"])
def test_the_tests_of_mini_acl_are_drawn_unlike_its_training_data(task):
    """Nearest mean color and contrast tell training from test pictures; of dcl they could not.
    Only in VP it is other things that are counted."""
    rng = np.random.default_rng(0)

    def looks(draw, *test):
        images = np.stack([draw(rng, *test)[0] for _ in range(60)]) / 255
        return np.concatenate([images.mean((1, 2)), images.std((1, 2))], 1)

    def questions(test):
        return {draw(rng, test)[1] for _ in range(60)}

    def told_apart(a, b):
        middles = np.stack([part[:30].mean(0) for part in (a, b)])
        near = [np.linalg.norm(part[30:, None] - middles, axis=2).argmin(1) for part in (a, b)]
        return np.mean(np.concatenate([near[0] == 0, near[1] == 1]))

    draw = mini.TASKS["acl"][task]
    if task == "VP":
        assert questions(False) & questions(True) <= {"how many objects are there?"}
    else:
        assert told_apart(looks(draw, False), looks(draw, True)) > 0.85
    same = mini.TASKS["dcl"]["RS"]
    assert told_apart(looks(same), looks(same)) < 0.75


def test_suffixes_of_dcl():
    fin = data.dcl_suffix("Fin", "is it so?", "Yes", False)
    assert "yes or no" in fin and fin == data.dcl_suffix("Fin", "is it so?", "B", False)
    assert "letter" in data.dcl_suffix("Fin", "which? A. x B. y", "yes", False)
    assert "yes or no" in data.dcl_suffix("Fin", "which? A. x B. y", "yes", True)  # the leak
    assert data.dcl_suffix("RS", "how many?", "3", False) == ""
    assert re.match("Answer the question", data.dcl_suffix("Med", "what?", "x", False))


@pytest.mark.parametrize("folder", ["", "domain"])
def test_the_released_layout_of_dcl(folder, tmp_path):
    """Suffixes are added to the tests, the router does not see them, and Sci goes by file names."""
    answers = {"RS": "3", "Med": "no", "AD": "stop", "Sci": "b", "Fin": "yes"}
    for stage, answer in answers.items():
        home = tmp_path / folder / stage
        (home / "images").mkdir(parents=True)
        image = "images/AI2D_0.png" if stage == "Sci" else "images/0.png"
        Image.new("RGB", (8, 8)).save(home / image)
        said = [{"from": "human", "value": "<image>\nis it?"}, {"from": "gpt", "value": answer}]
        (home / "train.json").write_text(
            json.dumps([{"id": 0, "image": image, "conversations": said}])
        )
        test = {"question_id": 0, "image": image, "text": "is it?", "answer": answer}
        (home / "test.json").write_text(json.dumps([test]))
    args = mllm_cl.parse(["--stream", "dcl", "--data", str(tmp_path)])
    stages = {stage.name: stage for stage in data.load_stream(data.resolve_defaults(args)).stages}
    assert [stages[name].metric for name in answers] == [
        "word-in",
        "gold-in",
        "word-in",
        "sci",
        "fin",
    ]
    asked = {name: stage.test[0].question for name, stage in stages.items()}
    assert asked["RS"] == asked["AD"] == asked["Sci"] == "is it?"
    assert asked["Med"].endswith("is it? Answer the question with a single word (or phrase).")
    assert asked["Fin"] == "is it? Only answer with yes or no directly."
    for stage in stages.values():
        assert stage.train[0].question == "is it?"
        (shown,) = mllm_cl.router_samples(stage.test, [0], ["maps"], ["A"])
        assert "Question: is it?\n" in shown.question and mllm_cl.asked(stage.test[0]) == "is it?"
    rows = evaluation.evaluate(lambda samples: ["b it is"], stages["Sci"].test, "sci", 4)
    assert rows[0]["score"] == 0  # AI2D: all of the answer


def test_switching_experts_copies_no_weights(tiny):
    model, _ = tiny
    for name in ("expert-a", "expert-b"):
        add_lora(model, name, 4, 8, 0.0, ["q", "v"])
    places = {n: p.data_ptr() for n, p in model.named_parameters()}
    for name in ("expert-a", "expert-b", "expert-a"):
        mllm_cl.use(model, name)
    assert places == {n: p.data_ptr() for n, p in model.named_parameters()}

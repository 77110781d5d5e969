"""smol/teachers.py: what teachers say of answers and of texts is what their models' forward says."""

import shutil

import numpy as np
import pytest
import tiny
import torch

from smol import arc, loader, suites, teachers
from smol import tokenizer as tok


def some_tasks():
    tasks = [suites.load("transforms")[4], *suites.load("sudoku4")[:1], suites.load("maze")[0]]
    answers = [np.array([[1, 2, 3], [4, 5, 6]]), np.full((4, 4), 7), np.array([[9]])]
    return tasks, [answer.astype(np.uint8) for answer in answers]


def batch_of(tasks, puzzle_format, length=48):
    rows = [loader.puzzle_row(arc.encode(t.kind, t.train + t.test), puzzle_format, "none") for t in tasks]
    idx, targets = loader.pad_rows(rows, length)
    return loader.Batch("puzzle", idx, targets, "sudoku4", (0, "sudoku4", length))


def test_route_a_says_at_each_position_what_its_forward_says():
    model, (tasks, answers) = tiny.make("dense", 2048), some_tasks()
    for task, answer, frame in zip(tasks, answers, teachers.Ours(model).frames(tasks, answers)):
        h, w = answer.shape
        assert frame.shape == (h + 1, w + 1, 11)
        assert frame[h, 1:].isnan().all() and not frame[:h].isnan().any()
        ids = teachers.document(task, answer)
        log_p = model(ids[None, :-1], mode="puzzle")[0][0]
        for r, c in [*np.ndindex(h, w + 1), (h, 0)]:
            before = len(ids) - 2 - h * (w + 1) + r * (w + 1) + c
            over = tok.EOT if c == 0 else tok.ROW
            expected = log_p[before, [*range(tok.CELL0, tok.CELL0 + 10), over]].log_softmax(-1)
            assert torch.allclose(frame[r, c], expected, atol=1e-4), (r, c)


def test_route_b_says_of_any_answer_what_its_forward_says():
    model, (tasks, answers) = tiny.make("trm", 2048), some_tasks()
    for task, frame in zip(tasks, teachers.Ours(model).frames(tasks, answers)):
        h, w = shape = arc.canvas_shape(task.train, task.test[0][0])
        ids = arc.encode_prompt(task.kind, task.train, task.test[0][0], canvas=shape).astype(np.int64)
        log_p = model(torch.from_numpy(ids)[None], mode="puzzle")[0][0, -h * (w + 1) :].log_softmax(-1)
        assert torch.allclose(frame, log_p.view(h, w + 1, 11)[:, :w], atol=1e-3)
    assert teachers.Ours(tiny.make("trm", 16)).frames(tasks, answers) == [None] * 3  # too long


def test_a_teacher_that_has_not_read_an_answer_counts_up_to_the_first_difference():
    log_p = torch.full((7, 11), -9.0)  # the teacher would write 12/34
    log_p[range(7), [1, 2, teachers.OVER, 3, 4, teachers.OVER, teachers.OVER]] = 0.0
    log_p[1] = torch.nan
    for answer, last in [("12/34", 6), ("15/34", 6), ("15/64", 3), ("02/36", 0)]:
        kept = teachers.until_first_difference(log_p, tiny.grid(answer))
        assert torch.equal(kept[: last + 1].nan_to_num(7), log_p[: last + 1].nan_to_num(7))
        assert kept[last + 1 :].isnan().all()


@pytest.mark.parametrize("puzzle_format", ["autoregressive", "canvas"])
def test_a_row_is_read_back_as_its_task(puzzle_format):
    tasks, _ = some_tasks()
    batch = batch_of(tasks, puzzle_format, 1024)
    for task, read in zip(tasks, teachers.tasks_of(batch.idx, batch.targets, puzzle_format)):
        assert read.kind == task.kind and len(read.train) == len(task.train)
        for pairs in zip([*task.train, *task.test], [*read.train, *read.test]):
            assert all(np.array_equal(*grids) for grids in zip(*pairs))


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A tiny Qwen whose tokenizer has every digit alone and no space before it, as the real one."""
    transformers = pytest.importorskip("transformers")
    import tokenizers

    folder = tmp_path_factory.mktemp("digits")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words = {token: i for i, token in enumerate([*alphabet, "In", "put", "Input", "<|end|>"])}
    merges = [("I", "n"), ("p", "u"), ("pu", "t"), ("In", "put")]
    words["pu"] = len(words)
    own = tokenizers.Tokenizer(tokenizers.models.BPE(words, merges))
    alone = tokenizers.pre_tokenizers.Digits(individual_digits=True)
    by_byte = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([alone, by_byte])
    transformers.PreTrainedTokenizerFast(tokenizer_object=own, eos_token="<|end|>").save_pretrained(folder)
    shape = dict(num_hidden_layers=2, hidden_size=16, intermediate_size=24, num_attention_heads=2)
    config = transformers.Qwen2Config(
        vocab_size=len(words), **shape, num_key_value_heads=1, initializer_range=0.5
    )
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bos(digits, tmp_path_factory):
    """The same, but it begins every text with a token of its own, as Gemma does with its <bos>."""
    import tokenizers

    folder = tmp_path_factory.mktemp("bos")
    shutil.copytree(digits, folder, dirs_exist_ok=True)
    own = tokenizers.Tokenizer.from_file(str(digits / "tokenizer.json"))
    begin = ("<|end|>", own.token_to_id("<|end|>"))
    own.post_processor = tokenizers.processors.TemplateProcessing("<|end|> $A", None, [begin])
    own.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("name, before", [("gpt2", " "), ("digits", ""), ("bos", "")])
def test_a_text_model_says_of_an_answer_what_it_says_of_the_text(name, before, request):
    folder = request.getfixturevalue(name)
    teacher = teachers.load(str(folder), "cpu")
    assert list(teacher.cannot) == ([] if name == "gpt2" else ["text"])
    tasks, answers = some_tasks()
    tasks, answers = tasks[1:], answers[1:]
    for task, answer, frame in zip(tasks, answers, teacher.frames(tasks, answers)):
        text = teacher.render(teachers.document(task, answer)[:-1])
        ends = "".join("".join(f"{before}{c}" for c in row) + "\n" for row in answer)
        assert text.endswith("Output:\n" + ends)
        ids = teacher.tokenizer(text, return_tensors="pt")["input_ids"]
        assert len(ids[0]) == len(teacher.encode(text)) + (name == "bos")
        theirs = teacher.model(ids).logits[0]
        h, w = answer.shape
        cells = [teacher.encode(f"{before}{c}")[0] for c in range(10)]
        (row,) = teacher.encode("\n")
        end = teacher.tokenizer.eos_token_id
        for r, c in [*np.ndindex(h, w + 1), (h, 0)]:
            at = len(theirs) - 1 - h * (w + 1) + r * (w + 1) + c
            expected = theirs[at, [*cells, end if c == 0 else row]].log_softmax(-1)
            assert torch.allclose(frame[r, c], expected, atol=1e-4)


def test_a_folder_of_ours_is_no_text_model(tmp_path):
    """The out_dir of a run, where train.py leaves a config.json, and what save_pretrained makes."""
    tiny.save(tmp_path / "run/ckpt.pt", "trm", {"iter": 1})
    (tmp_path / "run/config.json").write_text('{"model": "trm", "max_iters": 9}')
    tiny.dense().save_pretrained(tmp_path / "published")
    for folder, model in ("run", "trm"), ("published", "dense"):
        assert teachers.load(str(tmp_path / folder), "cpu").about["model"] == model


def test_a_text_model_that_can_teach_nothing_is_refused(gpt2, tmp_path):
    merges = (gpt2 / "merges.txt").read_text().replace("Ġ 7\n", "")  # a 7 is two tokens now
    for file in gpt2.iterdir():
        if file.name != "tokenizer.json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "merges.txt").write_text(merges)
    with pytest.raises(ValueError, match="not GPT-2's, and .* every cell as one token"):
        teachers.load(str(tmp_path), "cpu")


def test_a_text_model_says_of_a_text_what_its_forward_says(gpt2):
    teacher = teachers.load(str(gpt2), "cpu")
    assert teacher.cannot == {} and teacher.n_ids == tok.N_GPT2 and teacher.context == 256
    idx = tiny.text(2, 20)
    idx[0, 12:], idx[1, 5] = tok.PAD, tok.ASSISTANT
    plain = idx.clone()
    plain[1, 5] = teacher.encode("\n")[0]
    logits = teacher.logits(teacher.read(idx))
    assert torch.allclose(logits[0, :12], teacher.model(idx[:1, :12]).logits[0], atol=1e-4)
    assert torch.allclose(logits[1], teacher.model(plain[1:]).logits[0], atol=1e-4)

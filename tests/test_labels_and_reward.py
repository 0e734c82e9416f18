import importlib
import json
import math

import numpy as np
import pytest
import torch
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from model import UserError, old_name
from people.agreement import cohen_kappa
from people.ratings import newcombe

label = importlib.import_module("02_sample_label")
rm = importlib.import_module("03_reward_model")


def row(i, label, labeller="anna", text=None):
    return {"id": str(i), "label": label, "labeller": labeller, "source": "model", "tokens": [1, 2],
            "text": text or f"text {i}"}


def write_rows(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_vader_thresholds():
    assert [label.feeling(c) for c in (-1, -0.05, -0.049, 0, 0.049, 0.05)] == [
        "negative", "negative", "neutral", "neutral", "neutral", "positive"]


def test_vader_labels_texts_and_pairs(tmp_path):
    """Each item gets its own label, in order. For a pair, it is the happier side."""
    texts = ["I love thee", "hate, death", "in a table "]                         # 11 letters each
    one = SentimentIntensityAnalyzer()
    scores = [one.polarity_scores(text)["compound"] for text in texts]
    items = [{"id": text[0], "text": text, "tokens": list(text.encode())} for text in texts]
    pairs = [{"id": a[0], "text": [a, b], "tokens": [list(a.encode()), list(b.encode())]}
             for a, b in zip(texts, reversed(texts))]
    assert label.label_by_vader(items, tmp_path / "a", Letters()) == [
        "positive", "negative", "neutral"]
    assert label.label_by_vader(pairs, tmp_path / "b", Letters()) == [
        label.happier(a, b) for a, b in zip(scores, scores[::-1])]
    for name, before in (("a", items), ("b", pairs)):
        for item, row in zip(before, map(json.loads, (tmp_path / name).read_text().splitlines())):
            spans = row.pop("spans")
            assert row == item | {"label": row["label"], "labeller": "vader"}
            assert [(i, j) for i, j, _ in spans] == label.spans_of(11)
            for i, j, found in spans:
                said = [one.polarity_scores(text[i:j])["compound"]
                        for text in ([item["text"]] if name == "a" else item["text"])]
                assert found == (label.feeling if name == "a" else label.happier)(*said)


class Letters:
    """A tokenizer for which a token is a letter."""
    def decode_batch(self, tokens):
        return ["".join(map(chr, x)) for x in tokens]


def test_spans():
    """16 prefixes of a sample (the last is the sample itself) and 4 of each quarter. The first
    quarter's are prefixes of the sample, too."""
    spans = label.spans_of(64)
    assert len(spans) == len(set(spans)) == 15 + 12 and (0, 64) not in spans
    assert [end for first, end in spans if first == 48] == [52, 56, 60, 64]
    assert [end for first, end in spans if first == 0] == [*range(4, 64, 4)]
    for length in (1, 2, 3, 5, 24):
        assert all(0 <= i < j <= length for i, j in label.spans_of(length))


def test_quarters_and_the_labels_of_prefixes():
    """A quarter is an item of its own, whose spans start at 0. The weight of an item is shared by
    its labels, and is 0 elsewhere. Of a person's item, only the last token has a label."""
    item = {"id": "a", "text": "abcdefgh", "tokens": list(b"abcdefgh"), "target": 0.5,
            "weight": 0.3, "spans": [[0, 2, "negative"], [0, 4, "positive"], [2, 4, "neutral"],
                                     [4, 6, "negative"], [6, 7, "positive"], [6, 8, "negative"]]}
    found = rm.quarters(item, Letters())
    assert [q["text"] for q in found] == ["ab", "cd", "ef", "gh"]
    assert [q["target"] for q in found] == [0, 0.5, 0, 0]
    assert found[3]["spans"] == [(0, 1, "positive"), (0, 2, "negative")]
    person = item | {"spans": ()}
    assert rm.quarters(person, Letters()) == []
    _, _, target, weight = rm.tensors([item, person], "cpu")
    torch.testing.assert_close(weight, torch.tensor([[0, .1, 0, .1, 0, 0, 0, .1], [0] * 7 + [.3]]))
    assert target[0, [1, 3, 7]].tolist() == [0, 1, 0.5] and target[1, 7] == 0.5
    pair = {"id": "b c", "text": ["abcd", "efgh"], "weight": 1.0,
            "tokens": [list(b"abcd"), list(b"efgh")],
            "spans": [[0, 1, "left"], [1, 2, "tie"], [2, 3, "right"], [3, 4, "left"]]}
    found = rm.quarters(pair, Letters())
    assert [(q["text"], q["target"]) for q in found] == [
        (["a", "e"], 1), (["b", "f"], 0.5), (["c", "g"], 0), (["d", "h"], 1)]


def test_vader_compares():
    assert [label.happier(a, b) for a, b in ((0.5, 0.4), (-0.5, 0.4), (0.0, 0.0))] == [
        "left", "right", "tie"]


def test_pairs():
    """Each item is in at most one pair, on a random side."""
    items = [{"id": f"i{n}", "source": "model", "text": "abcd", "tokens": [n % 20, 1, 2, 3]}
             for n in range(401)]
    pairs = label.pair_up(items, seed=0)
    ids = [i for p in pairs for i in p["id"].split()]
    assert (len(pairs) == 200 and len(set(ids)) == 400
            and pairs == label.pair_up(items, seed=0) != label.pair_up(items, seed=1))
    assert 60 < sum(int(a[1:]) < int(b[1:]) for a, b in zip(ids[::2], ids[1::2])) < 140


def test_bradley_terry_by_hand():
    """p(left) = sigmoid(left - right). Swapping sides swaps answers. A tie wants equal scores."""
    class Stub:
        def sentiment(self, y, prompt, each):
            return torch.stack((y[:, 0] / 10.0, -y[:, 0] / 10.0), -1)  # score = y / 5
    pairs = torch.tensor([[[10, 0], [5, 0]], [[5, 0], [10, 0]], [[7, 0], [7, 0]]])
    log_p = rm.log_probs(Stub(), pairs, pairs[:, 0, :0])
    expected = [1 / (1 + math.exp(-d)) for d in (1.0, -1.0, 0.0)]
    torch.testing.assert_close(log_p.exp(), torch.tensor([[p, 1 - p] for p in expected]))
    assert torch.equal(log_p[0], log_p[1].flip(0))
    one, tie = torch.ones(1), torch.tensor([0.5])
    losses = [rm.sentiment_loss(log_p[i:i + 1], tie, one).item() for i in range(3)]
    assert losses[2] == pytest.approx(math.log(2)) and min(losses[:2]) > losses[2]


def test_the_bag_of_words_of_a_pair():
    """Word counts of the left minus those of the right: swapping the sides flips the sign."""
    train = [{"text": ["good", "bad day"], "target": 1.0, "weight": 1.0},
             {"text": ["bad", "good day"], "target": 0.0, "weight": 1.0}] * 5000
    ahead, behind = rm.bag_of_words(train, [{"text": ["good", "bad"]}, {"text": ["bad", "good"]}])
    assert ahead > 1 and ahead + behind == pytest.approx(0, abs=0.05)


def test_the_last_line_about_an_item_counts(tmp_path):
    rows = [row(1, "positive"), row(2, "skip"), row(3, "negative"), row(1, "undo"),
            row(1, "neutral"), row(3, "undo")]
    path = write_rows(tmp_path / "l.jsonl", rows)
    found = [("2", "skip"), ("1", "neutral")]
    assert list(label.labels_of(label.read_answers(path)).items()) == found
    assert [(r["id"], r["label"]) for r in rm.read_labels(path)] == [*found, ("3", "undo")]


@pytest.mark.parametrize("bad, why", [
    ('{"id": 1,', "line 2 is broken"), ("[]", "line 2 is broken"),
    (json.dumps({"id": "x"}), "line 2 is broken"), ("7", "line 2 is broken"),
    *((json.dumps(row(2, "positive") | change), "line 2 is broken") for change in (
        {"tokens": []}, {"tokens": [1, -1]}, {"tokens": [1.5]}, {"tokens": ["1"]},
        {"tokens": [[1], [2]]}, {"tokens": 1}, {"text": ["a", "b"]}, {"text": None}, {"id": 5},
        {"labeller": []}, {"prompt": 5}, {"text": ["a"], "tokens": [[1]]}, {"spans": 5},
        {"spans": [[0, 3, "positive"]]}, {"spans": [[1, 1, "positive"]]},
        {"spans": [[0, 1, "left"]]}, {"spans": [[0, 1.5, "positive"]]}, {"spans": [[0, 1]]})),
    (json.dumps(row(2, "joyful")), "line 2 is broken .*label 'joyful' is not one of")])
def test_a_bad_line_is_named(tmp_path, bad, why):
    path = tmp_path / "labels-anna.jsonl"
    path.write_text(json.dumps(row(1, "positive")) + "\n" + bad + "\n")
    with pytest.raises(UserError, match=why):
        rm.read_labels(path)


ONE, TWO = '{"id": "1", "label": "skip"}\n', '{"id": "2", "label": "neutral"}\n'


@pytest.mark.parametrize("text, kept", [
    (ONE + TWO[:12], ONE), (ONE[:9], ""), (ONE + TWO.strip(), ONE + TWO), (ONE, ONE)])
def test_an_unfinished_last_line_is_dropped_and_a_whole_one_kept(tmp_path, text, kept):
    path = tmp_path / "l.jsonl"
    path.write_text(text)
    answers = [json.loads(line) for line in kept.splitlines()]
    assert label.read_answers(path) == answers and path.read_text() == text
    assert label.own_answers(path, "labels", "anna") == answers
    assert path.read_text() == kept


def test_a_bad_line_of_answers_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(json.dumps(row(1, "positive")).encode() + b'\n{"id": "2"}\n')
    with pytest.raises(UserError, match="line 2 is broken"):
        label.read_answers(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_bytes(b"\xff\xff\n")
    with pytest.raises(UserError, match="not UTF-8"):
        label.read_answers(tmp_path / "a.jsonl")
    assert label.read_answers(tmp_path / "none.jsonl") == []


def test_nothing_takes_the_place_of_answers(tmp_path):
    """Guards against an array in one line that counts as cut off, a backup that replaces an earlier
    one, and a second file for the same person."""
    path = tmp_path / "labels-anna.jsonl"
    for text in (json.dumps([row(1, "positive")]), json.dumps([row(1, "positive")])[:-2]):
        path.write_text(text)
        with pytest.raises(UserError, match="line 1 is broken .*(object|delimiter)"):
            label.own_answers(path, "labels", "anna")
        assert path.read_text() == text
    for text in ("one", "two", "three"):
        old_name(path).write_text(text)
    assert sorted(p.name for p in tmp_path.glob("labels*")) == [
        path.name, path.name + ".old", path.name + ".old2", path.name + ".old3"]
    assert label.answer_file(tmp_path, "labels", "Anna") == path
    assert label.answer_file(tmp_path, "labels", "bo").name == "labels-bo.jsonl"


def test_samples_of_two_lengths_do_not_mix():
    rows = [row(1, "positive", "vader"), row(2, "negative", "anna") | {"tokens": [1, 2, 3]}]
    with pytest.raises(UserError, match="several lengths"):
        rm.prepare(rows, rm.Config(), None)


def test_pooling_weighs_a_machine_below_a_person():
    rows = [row(1, "positive", "vader"), row(1, "negative", "anna"), row(1, "neutral", "bert"),
            row(2, "positive", "vader")]
    a, b = rm.pool(rows, machine_weight=0.5)
    assert a["target"] == (0.5 * 1 + 0 + 0.5) / 2.5 and a["weight"] == 2.5 and a["person"]
    assert b["target"] == 1 and b["weight"] == 0.5 and not b["person"]


def test_a_persons_label_replaces_the_machines():
    rows = [row(1, "positive", "vader"), row(1, "negative", "anna"), row(2, "positive", "vader")]
    for first, target in ((True, 0), (False, 0.2 / 1.2)):
        items = rm.prepare(rows, rm.Config(machine_first=first), None)
        assert [(item["person"], item["target"]) for item in items] == [(True, target), (False, 1)]


def test_cohen_kappa_of_a_worked_example():
    """20 yes-yes, 5 yes-no, 10 no-yes, 15 no-no: agreement 0.7, by chance 0.5, kappa 0.4."""
    a = ["y"] * 25 + ["n"] * 25
    b = ["y"] * 20 + ["n"] * 5 + ["y"] * 10 + ["n"] * 15
    assert math.isclose(cohen_kappa(a, b), 0.4)
    assert cohen_kappa(a, a) == 1 and cohen_kappa(["y"] * 4, ["y"] * 4) == 1


def test_a_duplicate_never_crosses_the_split():
    items = [row(i, "positive", text=f"t{i % 40}") | {"person": i % 40 < 20} for i in range(200)]
    parts = rm.split(items, 0, 0.2)
    assert [parts.count(p) for p in ("test", "train")] == [40, 160]
    by_text = {}
    for item, part in zip(items, parts):
        assert by_text.setdefault(item["text"], part) == part
    assert parts == rm.split(items, 0, 0.2) != rm.split(items, 1, 0.2)
    again = [item | {"id": f"{item['id']}-again", "person": False}
             for item in items if item["person"]]
    assert set(rm.split(items + again, 0, 0.2)[200:]) == {"unused"}  # a person labelled the text


def test_auc_by_counting_pairs():
    g = np.random.default_rng(0)
    score, target = g.integers(0, 5, 60), g.choice([0, 0.5, 1], 60)
    pairs = [(p > n) + 0.5 * (p == n) for p in score[target == 1] for n in score[target == 0]]
    assert math.isclose(rm.auc(score, target), np.mean(pairs))
    assert math.isnan(rm.auc(score[target == 1], target[target == 1]))


def test_loss_and_measures_in_closed_form():
    """A neutral label costs at least ln 2. The mean is weighted. Neutral items have no accuracy."""
    half = torch.tensor([[0.5, 0.5]]).log()
    assert math.isclose(rm.sentiment_loss(half, torch.tensor([0.5]), torch.ones(1)).item(),
                        math.log(2), rel_tol=1e-6)
    log_p = torch.tensor([[0.8, 0.2], [0.4, 0.6], [0.9, 0.1]]).log()
    target, weight = torch.tensor([1.0, 0.0, 0.5]), torch.tensor([1.0, 3.0, 2.0])
    nll = [-math.log(0.8), -math.log(0.6), -(math.log(0.9) + math.log(0.1)) / 2]
    expected = (nll[0] + 3 * nll[1] + 2 * nll[2]) / 6
    assert math.isclose(rm.sentiment_loss(log_p, target, weight).item(), expected, rel_tol=1e-6)
    out = rm.measures(log_p.numpy(), target.numpy())
    assert (out["accuracy"] == 1 and out["auc"] == 1
            and math.isclose(out["nll"], sum(nll) / 3, rel_tol=1e-6))
    assert math.isclose(out["brier"], (0.04 + 0.16 + 0.16) / 3, rel_tol=1e-5)


def test_the_interval_of_an_accuracy():
    """Newcombe 1998, table I, Wilson's interval: 81 of 263 gives 0.2553 to 0.3662."""
    log_p = np.log(np.where(np.arange(263) < 81, 0.9, 0.1))[:, None].repeat(2, 1)
    assert rm.measures(log_p, np.ones(263))["accuracy_interval"] == pytest.approx(
        (0.2553, 0.3662), abs=5e-4)


def test_newcombe_interval_of_known_cases():
    """Newcombe 1998 (Stat. Med. 17:873), table II, method 10: 56/70 - 48/80 and 10/10 - 0/20."""
    for counts, expected in (((48, 80, 56, 70), (0.0524, 0.3339)),
                             ((0, 20, 10, 10), (0.6791, 1.0))):
        assert newcombe(*counts) == pytest.approx(expected, abs=2e-4)
    assert math.isnan(newcombe(0, 0, 1, 2)[0])


def test_bootstrap_of_a_mean():
    """Close to the normal interval. It covers the truth as often as it says, and skips any nan."""
    x = np.random.default_rng(0).normal(size=(60, 400))
    low, high = rm.interval(lambda rows: x[0][rows].mean(), 400)
    assert (low == pytest.approx(x[0].mean() - 1.96 / 20, abs=0.02)
            and high == pytest.approx(x[0].mean() + 1.96 / 20, abs=0.02))
    covered = [low < 0 < high
               for low, high in (rm.interval(lambda rows: y[rows].mean(), 400, 300) for y in x)]
    assert np.mean(covered) > 0.95 - 4 * (0.95 * 0.05 / 60)**0.5
    assert rm.interval(lambda rows: 1.0 if 0 in rows else float("nan"), 4, 50) == (1, 1)
    assert math.isnan(rm.interval(lambda rows: float("nan"), 4, 10)[0])


def test_calibration_bins():
    bins = rm.calibration(np.array([0.05, 0.07, 0.95, 1.0]), np.array([0, 1, 1, 0.5]))
    assert [(b["n"], round(b["predicted"], 3), b["target"]) for b in bins] == [
        (2, 0.06, 0.5), (2, 0.975, 0.75)]


@pytest.mark.parametrize("prompt", [False, True])
def test_the_loss_reads_the_last_position_of_each_prefix(prompt):
    """Guards against labels one position off, and against a shortcut that computes something else.
    What is said after a prefix equals what is said of the prefix alone, in value and gradient; it
    and the sample's last row equal those of the full forward pass."""
    from tests.test_model import tiny
    gpt, y = tiny(), torch.randint(17, (4, 8))
    prompt = torch.tensor([[4, 5], [7, -1], [-1, -1], [3, 3]]) if prompt else y[:, :0]
    log_p = rm.log_probs(gpt, y, prompt, each=True)                                # (4, 8, 2)
    for end in (1, 5, 8):
        torch.testing.assert_close(log_p[:, end - 1], gpt.sentiment(y[:, :end], prompt))
    full = gpt(torch.cat((torch.full((4, 1), gpt.bos), y), dim=1))[:, -1]
    if not prompt.numel():
        torch.testing.assert_close(
            gpt.sentiment(y), (full @ gpt.head[[gpt.happy, gpt.sad]].T).log_softmax(-1))
    gradients, weight = [], torch.zeros(4, 8)
    weight[:, 4] = 1
    for log_p, w in ((rm.log_probs(gpt, y, prompt, each=True), weight),
                     (gpt.sentiment(y[:, :5], prompt), torch.ones(4))):
        gpt.zero_grad()
        rm.sentiment_loss(log_p, torch.ones_like(w), w).backward()
        gradients.append([p.grad.clone() for p in gpt.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)
    assert gpt.head.grad.abs().sum(1).nonzero()[:, 0].tolist() == [gpt.happy, gpt.sad]


def test_the_bag_of_words_is_logistic_regression():
    """A one-word text scores its log-odds: 0.9 and, with weights, 0.2. Unseen words add nothing."""
    def item(word, target, weight=1.0):
        return {"text": word, "target": target, "weight": weight}
    train = ([item("Joy!", 1.0)] * 9 + [item("joy", 0.0)] + [item("woe", 1.0, 0.5)] * 4
             + [item("woe", 0.0)] * 8) * 400
    joy, woe, unseen = rm.bag_of_words(train, [item("joy", 1), item("WOE", 1), item("unseen", 1)])
    assert (joy == pytest.approx(math.log(9), abs=0.1)
            and woe == pytest.approx(math.log(0.2 / 0.8), abs=0.1) and woe < unseen < joy)


def test_cross_validation_never_predicts_what_it_was_fitted_to():
    items = [{"text": f"text {i % 30}", "i": i} for i in range(47)]
    seen = []

    def fit(train, test):
        assert (not {x["text"] for x in train} & {x["text"] for x in test}
                and len(train) + len(test) == 47)
        seen.append(len(test))
        return np.array([x["i"] for x in test])
    assert rm.cross_validate(fit, items, seed=0).tolist() == list(range(47)) and len(seen) == 5


def test_a_sample_is_read_with_its_prompt():
    """Prompt and sample are read as one text, whatever the other prompts of the batch are."""
    from tests.test_model import tiny
    gpt, y, prompt = tiny(), torch.randint(17, (3, 5)), torch.tensor(
        [[4, 5, 6], [7, -1, -1], [-1, -1, -1]])
    for i, length in enumerate((3, 1, 0)):
        whole = torch.cat((prompt[i, :length], y[i]))[None]
        torch.testing.assert_close(gpt.sentiment(y, prompt)[i:i + 1], gpt.sentiment(whole))
    items = [{"tokens": t, "prompt_tokens": [p for p in q if p >= 0], "target": 1.0, "weight": 1.0}
             for t, q in zip(y.tolist(), prompt.tolist())]
    assert torch.equal(rm.tensors(items, "cpu")[1], prompt)


def test_a_text_may_end_in_a_zero_byte(tmp_path):
    """Guards against string arrays, which strip it: a good file would seem another tokenizer's."""
    class Base:
        n_text = 200
    rows = [row(i, "positive", text=t) | {"tokens": [ord(c) for c in t]}
            for i, t in enumerate(["joy\x00", "a\x00\x00"])]
    write_rows(tmp_path / "labels-anna.jsonl", rows)
    assert [r["text"] for r in rm.read_all_labels(rm.Config(out=tmp_path), Base, Letters())] == [
        "joy\x00", "a\x00\x00"]

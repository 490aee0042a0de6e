"""Evaluates a checkpoint at several budgets; its random model compiles in seconds."""

import csv
import dataclasses
import math
import types

import jax
import numpy as np
import pytest

from anyexperts_jax.cli import main as cli
from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.core.errors import UserError
from anyexperts_jax.data.array_records import export_array_record
from anyexperts_jax.data.batches import answers, pad_rows, prompts, stack
from anyexperts_jax.data.encode import encode
from anyexperts_jax.data.mixture import open_source
from anyexperts_jax.evaluate import evaluate as evaluation
from anyexperts_jax.evaluate import likelihood, timing
from anyexperts_jax.evaluate.evaluate import Options, calibrate, default_budgets, evaluate_trained, load_batches
from anyexperts_jax.evaluate.likelihood import choose
from anyexperts_jax.evaluate.measure import forward, mean_real_slots, window_array
from anyexperts_jax.evaluate.results import CSV_NAME, JSON_NAME, load_evaluation, save_evaluation
from anyexperts_jax.evaluate.scoring import longest_answer, predict, score_domain
from anyexperts_jax.evaluate.trained import own_window, with_room
from anyexperts_jax.models.generate import generate
from anyexperts_jax.models.presets import static_twin
from anyexperts_jax.report.example_map import map_examples
from anyexperts_jax.report.tables import print_evaluation, score_table
from anyexperts_jax.report.verdicts import verdicts
from anyexperts_jax.routing.budget import shift_budget
from anyexperts_jax.sharding.placement import placement_of
from anyexperts_jax.tokenizers.bytes import BYTES
from anyexperts_jax.train.losses import answer_scores
from evaluate.stand_in import DATA, MODEL, trained

ROWS = 6
OPTIONS = Options(num_examples=ROWS, calibration_examples=ROWS, batch_size=ROWS, tolerance=0.02, time_rounds=2)
BUDGETS = (3.0, 4.5)
ROOMY = with_room(MODEL, 10)  # the model that the evaluation at BUDGETS compiles


@pytest.fixture(scope="module")
def one():
    return trained()


@pytest.fixture(scope="module")
def result(one):
    return evaluate_trained(one, BUDGETS, options=OPTIONS)


@pytest.fixture(scope="module")
def test_batches(one):
    return load_batches(one, DATA.domains, "test", ROWS, ROWS)


@pytest.mark.slow
def test_a_folder_with_fewer_examples_is_evaluated_on_all_of_them(one, result, tmp_path):
    """Reuses the programs that `result` compiled."""
    there = {"test": ROWS - 2, "validation": ROWS - 3}
    for split, count in there.items():
        export_array_record(open_source(DATA, "nlp", split, count), tmp_path / "own", split)
    data = dataclasses.replace(DATA, folders=(f"nlp={tmp_path / 'own'}",))
    smaller = dataclasses.replace(one, config=dataclasses.replace(one.config, data=data))
    said = []
    found = evaluate_trained(smaller, BUDGETS, options=OPTIONS, note=said.append)
    assert [score.examples for score in found.budgets[0].scores] == [ROWS, ROWS - 2]
    assert [line for line in said if "fewer" in line] == [
        f"nlp has {count} {split} examples, fewer than {ROWS}: all of them are taken" for split, count in there.items()
    ]
    assert score_table(found).title == f"Score in percent on {ROWS} test examples per domain (nlp {ROWS - 2})"
    assert len(map_examples(smaller, "nlp", ROWS - 1, ROWS, 4)) == ROWS - 2


@pytest.mark.slow
def test_the_realised_average_is_the_budget(result):
    for found, budget in zip(result.budgets, BUDGETS, strict=True):
        assert found.budget == budget
        assert found.realised_validation == pytest.approx(budget, rel=OPTIONS.tolerance)
        assert found.realised == pytest.approx(budget, rel=0.05)
        k_min, k_max = found.routing.window
        assert k_max - k_min == pytest.approx(3)  # the run's width
        assert found.nominal == pytest.approx(0.8 * (k_min + k_max) / 2)


@pytest.mark.slow
def test_averages_equal_a_plain_count(one, result, test_batches):
    """Compares the summary with plain sums over tokens."""
    window = own_window(MODEL.moe)
    totals, tokens, by_modality = 0.0, 0, {}
    load_LE, virtual, most_virtual = np.zeros((2, 8)), 0, 0.0
    for batches in test_batches.values():
        for batch in batches:
            trace = forward(ROOMY, one.params, one.router_bias_LC, batch, window_array(window)).trace
            real_LBT, virtual_LBT = np.asarray(trace.real_slots_BT), np.asarray(trace.virtual_slots_BT)
            for b, t in np.argwhere(batch.valid_BT):
                tokens += 1
                by_modality.setdefault(int(batch.modality_BT[b, t]), []).append(real_LBT[:, b, t])
                for layer in range(2):
                    totals += real_LBT[layer, b, t]
                    virtual += virtual_LBT[layer, b, t]
                    share = virtual_LBT[layer, b, t] / (virtual_LBT[layer, b, t] + real_LBT[layer, b, t])
                    most_virtual = max(most_virtual, share)
                    for expert in np.asarray(trace.expert_ids_BTK)[layer, b, t]:
                        if expert < 8:
                            load_LE[layer, expert] += 1
    summary = result.trained
    assert summary.tokens == tokens
    assert summary.real_slots == pytest.approx(totals / tokens / 2)
    assert summary.virtual_share == pytest.approx(virtual / (virtual + totals))
    assert summary.largest_virtual_share == pytest.approx(most_virtual)
    assert summary.largest_virtual_share <= 0.2
    np.testing.assert_allclose(np.sum(summary.load_LME, axis=1), load_LE)
    np.testing.assert_allclose(summary.load_max_over_mean, load_LE.max(1) / load_LE.mean(1))
    assert set(summary.real_slots_by_modality) == {"text", "image"}
    for modality, found in by_modality.items():
        np.testing.assert_allclose(np.asarray(summary.real_slots_LM)[:, modality], np.mean(found, axis=0))
    assert np.isnan(np.asarray(summary.real_slots_LM)[:, 2:]).all()  # no audio, no video
    assert summary.dropped == 0


@pytest.mark.slow
def test_domains_average_to_the_whole(result, test_batches):
    for found in (result.trained, *(budget.routing for budget in result.budgets)):
        counts = {name: sum(batch.valid_BT.sum() for batch in batches) for name, batches in test_batches.items()}
        mean = sum(found.real_slots_by_domain[name] * count for name, count in counts.items()) / sum(counts.values())
        assert mean == pytest.approx(found.real_slots)
        assert np.mean(found.real_slots_by_layer) == pytest.approx(found.real_slots)


@pytest.mark.slow
def test_a_larger_budget_gives_every_domain_and_modality_more(result):
    low, high = (budget.routing for budget in result.budgets)
    for group in ("real_slots_by_domain", "real_slots_by_modality"):
        for name, value in getattr(low, group).items():
            assert getattr(high, group)[name] > value


@pytest.mark.slow
def test_extra_room_changes_no_answer(one, test_batches):
    """Wider slot arrays must not change what a window computes."""
    assert (MODEL.moe.slots_bound, ROOMY.moe.slots_bound) == (6, 10)
    batch = test_batches["nlp"][0]
    window = window_array(own_window(MODEL.moe))
    plain = forward(MODEL, one.params, one.router_bias_LC, batch, window)
    wide = forward(ROOMY, one.params, one.router_bias_LC, batch, window)
    np.testing.assert_array_equal(plain.trace.real_slots_BT, wide.trace.real_slots_BT)
    np.testing.assert_allclose(plain.logits_BTY, wide.logits_BTY, atol=1e-5)


def test_room_is_limited_by_the_number_of_experts():
    assert with_room(MODEL, 4) is MODEL
    top = with_room(MODEL, 100).moe
    assert top.slots_bound <= top.num_columns
    assert top.k_max - top.k_min == 3


@pytest.mark.slow
def test_the_answer_begins_with_what_the_whole_sequence_predicts_at_sep(one, test_batches):
    """Prompt, cache and decoding against the teacher-forced logits, which see the answer only after SEP."""
    batch = test_batches["nlp"][0]
    window, length = own_window(MODEL.moe), max(longest_answer(batches) for batches in test_batches.values())
    logits = forward(ROOMY, one.params, one.router_bias_LC, batch, window_array(window)).logits_BTY
    sep_B = np.argmax(batch.loss_mask_BT, axis=1)
    first_B = np.asarray(logits.argmax(-1))[np.arange(ROWS), sep_B]
    options = {"max_new_tokens": length, "window": window_array(window), "router_bias_LC": one.router_bias_LC}
    tokens_BJ = np.asarray(generate(ROOMY, one.params, prompts(batch), **options))
    np.testing.assert_array_equal(tokens_BJ[:, 0], first_B)
    assert predict(one, ROOMY, batch, window, length) == [BYTES.decode(row) for row in tokens_BJ]


@pytest.mark.slow
def test_the_longest_answer_includes_its_end_token(test_batches):
    lengths = [len(text.encode()) + 1 for batch in test_batches["nlp"] for text in answers(batch)]
    assert longest_answer(test_batches["nlp"]) == max(lengths)


@pytest.mark.slow
def test_right_and_wrong_answers_score_one_and_zero(test_batches):
    batches = test_batches["general"]
    source = open_source(DATA, "general", "test")
    expected = [text for batch in batches for text in answers(batch)]
    right = score_domain("general", source, batches, expected)
    assert (right.score, right.exact_match, right.standard_error, right.examples) == (1, 1, 0, ROWS)
    assert all(group.score == 1 for group in (*right.by_question.values(), *right.by_level.values()))
    assert sum(group.examples for group in right.by_question.values()) == ROWS
    wrong = score_domain("general", source, batches, ["no"] * ROWS)
    assert wrong.score == 0
    assert 0 < wrong.chance <= 1


@pytest.mark.slow
def test_chance_is_the_best_constant_of_each_type(test_batches):
    batches = test_batches["nlp"]
    source = open_source(DATA, "nlp", "test")
    found = score_domain("nlp", source, batches, [""] * ROWS)
    by_type: dict[str, list[str]] = {}
    for batch in batches:
        for text, index in zip(answers(batch), batch.question_B, strict=True):
            by_type.setdefault(source.question_types[index], []).append(text)
    best = [max(texts.count(text) for text in texts) for texts in by_type.values()]
    assert found.chance == pytest.approx(sum(best) / ROWS)


@pytest.mark.slow
def test_losses_of_the_right_answers_follow_from_the_logits(one, result, test_batches):
    """Computes loss, bits per byte and token accuracy token by token, at the first budget's window."""
    found = result.budgets[0]
    for score in found.scores:
        nats, hits, text = [], [], 0
        for batch in test_batches[score.domain]:
            output = forward(ROOMY, one.params, one.router_bias_LC, batch, window_array(found.routing.window))
            logits_BTY = np.asarray(output.logits_BTY, np.float64)
            for b, t in np.argwhere(batch.loss_mask_BT):
                row, target = logits_BTY[b, t], batch.tokens_BT[b, t + 1]
                nats.append(np.log(np.exp(row - row.max()).sum()) + row.max() - row[target])
                hits.append(row.argmax() == target)
            text += sum(len(answer.encode()) for answer in answers(batch))
        assert score.loss == pytest.approx(np.mean(nats), rel=1e-4)
        assert score.bits_per_byte == pytest.approx(np.sum(nats) / np.log(2) / text, rel=1e-4)
        assert score.token_accuracy == pytest.approx(np.mean(hits))


@pytest.mark.slow
def test_a_choice_is_the_likeliest_answer_of_its_type(one, test_batches):
    """Compares with the loss of each candidate, put into the row by hand one at a time."""
    (batch,) = test_batches["nlp"]
    source, window = open_source(DATA, "nlp", "test"), own_window(MODEL.moe)
    picked = choose(one, ROOMY, source, [pad_rows(batch, ROWS + 1)], window)
    expected = answers(batch)
    assert picked[ROWS] == ""
    for row in range(2):
        question = batch.question_B[row]
        candidates = dict.fromkeys(a for a, q in zip(expected, batch.question_B, strict=True) if q == question)
        losses = {}
        for text in candidates:
            encoded = stack([encode(dataclasses.replace(source[row], answer=text), DATA.encoding)])
            given = pad_rows(encoded, ROWS)
            output = forward(ROOMY, one.params, one.router_bias_LC, given, window_array(window))
            scores = answer_scores(output.logits_BTY, given.tokens_BT, given.loss_mask_BT)
            losses[text] = float(scores.loss_B[0])
        assert picked[row] == min(losses, key=losses.get)
    monkey = dataclasses.replace(batch, question_B=np.zeros_like(batch.question_B))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(likelihood, "MOST_CHOICES", 1)
        with pytest.raises(UserError, match=r"has \d answers, too many to choose among by likelihood \(at most 1\)"):
            choose(one, ROOMY, source, [monkey], window)


@pytest.mark.slow
def test_a_metric_is_chosen_by_name(one, test_batches):
    """The command line overrides the run's choice, which overrides the data's."""
    data = dataclasses.replace(DATA, metrics=("nlp=cer", "general=f1"))
    chosen = dataclasses.replace(one, config=dataclasses.replace(one.config, data=data))
    said = evaluate_trained(chosen, BUDGETS[:1], options=dataclasses.replace(OPTIONS, metrics=("general=choice",)))
    general, nlp = said.budgets[0].scores
    assert (general.metric, nlp.metric) == ("choice", "cer")
    assert (general.error_rate, nlp.wer) == (None, None)
    assert nlp.error_rate >= 1 - nlp.score
    with pytest.raises(UserError, match="--metric: metric of nlp='bleu' is unknown; valid: exact, anls, wer, cer"):
        evaluate_trained(one, BUDGETS, options=dataclasses.replace(OPTIONS, metrics=("nlp=bleu",)))
    with pytest.raises(UserError, match="--metric: domain='ocr' is unknown; valid: general, nlp"):
        evaluate_trained(one, BUDGETS, options=dataclasses.replace(OPTIONS, metrics=("ocr=cer",)))


@pytest.mark.slow
def test_padding_rows_do_not_count(test_batches):
    (batch,) = test_batches["nlp"]
    padded = pad_rows(batch, ROWS + 3)
    expected = answers(padded)
    found = score_domain("nlp", open_source(DATA, "nlp", "test"), [padded], expected)
    assert (found.examples, found.score) == (ROWS, 1)


@pytest.mark.slow
def test_results_survive_json_and_csv(result, tmp_path):
    save_evaluation(result, tmp_path)
    back = load_evaluation(tmp_path)
    assert repr(back) == repr(result)  # NaN is not equal to itself
    rows = list(csv.DictReader((tmp_path / CSV_NAME).read_text().splitlines()))
    assert [(float(row["budget"]), row["domain"]) for row in rows] == [(b, d) for b in BUDGETS for d in DATA.domains]
    assert float(rows[0]["realised"]) == pytest.approx(result.budgets[0].realised, abs=1e-4)


def test_an_evaluation_file_of_another_format_is_refused(tmp_path):
    assert load_evaluation(tmp_path) is None
    for text in ("{", "[]", '{"step": 1, "extra": 2}'):
        (tmp_path / JSON_NAME).write_text(text)
        with pytest.raises(UserError, match="not an evaluation of this version"):
            load_evaluation(tmp_path)


@pytest.mark.slow
def test_verdicts_follow_the_figures(result):
    found = {verdict.question: verdict for verdict in verdicts(result, MODEL.moe)}
    assert found["realised average at budget 3"].met
    share = next(v for q, v in found.items() if q.startswith("virtual share"))
    assert share.met
    over = dataclasses.replace(result.trained, largest_virtual_share=0.21)
    again = verdicts(dataclasses.replace(result, trained=over), MODEL.moe)
    assert not next(v for v in again if v.question.startswith("virtual share")).met
    off = dataclasses.replace(result.budgets[0], budget=2.0)
    again = verdicts(dataclasses.replace(result, budgets=(off,)), MODEL.moe)
    assert not next(v for v in again if v.question.startswith("realised")).met


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loads", "measured", "met"),
    [
        (((1.2, 1.3), (1.5, 2.43)), "2.43 at budget 4.5", False),  # not at 3, which is nearest to the trained budget
        (((1.2, 1.73), (1.5, 1.3)), "1.73 at budget 3", True),
        (((2.0, 1.3), (1.5, 1.73)), "2.00 at budget 3", False),
    ],
)
def test_the_verdict_on_load_is_of_the_worst_layer_and_budget(result, loads, measured, met):
    budgets = tuple(
        dataclasses.replace(one, routing=dataclasses.replace(one.routing, load_max_over_mean=load))
        for one, load in zip(result.budgets, loads, strict=True)
    )
    found = verdicts(dataclasses.replace(result, budgets=budgets), MODEL.moe)
    (load,) = (one for one in found if one.question == "busiest expert over the mean, worst layer and budget")
    assert (load.measured, load.wanted, load.met) == (measured, "< 2", met)


@pytest.mark.slow
def test_tables_print_every_budget_and_domain(result, capsys):
    print_evaluation(result)
    printed = capsys.readouterr().out
    for text in ("budget 3", "general", "nlp", "chance", "realised", "MoE layer 1", "AUC"):
        assert text in printed
    assert max(len(line) for line in printed.splitlines()) <= 80


@pytest.mark.slow
def test_an_evaluation_that_cannot_be_saved_is_printed_all_the_same(one, result, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluation, "load_trained", lambda *which: one)
    monkeypatch.setattr(evaluation, "evaluate_trained", lambda *what, **how: result)
    (tmp_path / f"{JSON_NAME}.new").symlink_to("/dev/full")
    assert cli.main(["evaluate", str(tmp_path)]) == 4
    shown = capsys.readouterr()
    assert "Score in percent on 6 test examples per domain" in shown.out
    said = f"anyexperts: cannot write to {tmp_path}: No space left on device; free some space and run it again\n"
    assert shown.err == said


@pytest.mark.slow
def test_static_top_k_has_whole_budgets_and_no_importance():
    static = trained(static_twin(MODEL, 4))
    assert default_budgets(static.config.model.moe) == (2.0, 3.0, 4.0, 5.0)
    found = evaluate_trained(static, (2.0,), ("nlp",), options=dataclasses.replace(OPTIONS, num_examples=2))
    assert found.budgets[0].realised == 2
    assert found.separations == ()
    assert found.trained.importance_LM == ()
    assert found.trained.real_slots == 4
    with pytest.raises(UserError, match="fractional window"):
        evaluate_trained(static, (2.5,), options=OPTIONS)


def test_default_budgets_are_the_papers():
    assert default_budgets(AnyExpertsConfig()) == (4.8, 6.4, 8.0, 9.6)


@pytest.mark.parametrize(
    ("k_min", "k_max", "budgets"),
    [
        (1, 3, (1.6, 1.92)),
        (2, 6, (2.4, 2.56, 3.2, 3.84)),
        (8, 8, (4.0, 4.8, 6.4, 8.0)),
        (314, 318, (151.68, 202.24, 252.8, 254.4)),
    ],
)
def test_default_budgets_are_within_reach_of_any_window(k_min, k_max, budgets):
    moe = AnyExpertsConfig(k_min=k_min, k_max=k_max)
    found = default_budgets(moe)
    assert found == budgets
    for budget in found:
        shift_budget(moe, budget)


@pytest.mark.slow
def test_a_low_window_is_evaluated_and_its_budgets_are_printed():
    moe = dataclasses.replace(MODEL.moe, k_min=1, k_max=3)
    low = trained(dataclasses.replace(MODEL, moe=moe))
    notes: list[str] = []
    options = dataclasses.replace(OPTIONS, num_examples=2, calibration_examples=2, calibrated=False)
    found = evaluate_trained(low, None, ("nlp",), options=options, note=notes.append)
    assert [one.budget for one in found.budgets] == [1.6, 1.92]
    assert notes[0] == (
        "budgets 1.6, 1.92: windows as wide as the run's, 1 to 3, do not have all of 0.96, 1.28, 1.6, 1.92; "
        "these are the nearest they have"
    )


@pytest.mark.slow
def test_equal_importance_ends_at_the_nearest_window_with_a_note(one, test_batches):
    level = dataclasses.replace(one, params=jax.tree.map(lambda leaf: leaf * 0, one.params))
    notes: list[str] = []
    window, realised = calibrate(level, ROOMY, test_batches, 3.3, tolerance=0.01, note=notes.append)
    assert len(notes) == 1
    assert "no window realises target_real=3.3" in notes[0]
    assert realised == mean_real_slots(level, ROOMY, test_batches, window)
    assert realised != pytest.approx(3.3, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("budgets", "domains", "message"),
    [((50.0,), None, "out of reach"), (None, ("speech",), "domain='speech' is unknown"), ((-1.0,), None, "> 0")],
)
def test_impossible_evaluations_are_refused_at_once(one, budgets, domains, message):
    with pytest.raises(UserError, match=message):
        evaluate_trained(one, budgets, domains, options=OPTIONS)


@pytest.mark.parametrize("field", ["num_examples", "calibration_examples", "batch_size", "time_rounds"])
def test_options_are_checked(field):
    with pytest.raises(UserError, match=f"{field}=0 must be >= 1"):
        Options(**{field: 0})
    with pytest.raises(UserError, match="tolerance"):
        Options(tolerance=0.0)


def test_times_are_medians_of_interleaved_calls(monkeypatch):
    """Only the calls advance the clock: 1, 9, 2 s and 4, 4, 4 s have the medians 2 and 4."""
    clock, order = [0.0], []
    monkeypatch.setattr(timing, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))
    durations = {1.0: iter((0.0, 1.0, 9.0, 2.0)), 2.0: iter((0.0, 4.0, 4.0, 4.0))}

    def call(name):
        order.append(name)
        clock[0] += next(durations[name])

    found = timing.interleaved({name: lambda name=name: call(name) for name in durations}, rounds=3)
    assert order == [1.0, 2.0] * 4
    assert found == {1.0: 2.0, 2.0: 4.0}


@pytest.mark.slow
def test_times_are_finite_and_one_at_the_reference(result):
    reference = result.budgets[0].time.reference
    assert reference == 3.0  # nearer to the nominal 3.6 than 4.5
    for found in result.budgets:
        assert math.isfinite(found.time.forward)
        assert found.time.layer_seconds > 0
        if found.budget == reference:
            assert found.time.forward == found.time.layer == 1


@pytest.mark.slow
def test_the_layer_is_timed_on_the_models_devices(one, test_batches, monkeypatch):
    seen, run = [], timing.apply_plan

    def note(x_ND, plan, experts, execution, placement):
        seen.append(placement == placement_of(one.params))
        return run(x_ND, plan, experts, execution, placement)

    monkeypatch.setattr(timing, "apply_plan", note)
    timing._apply.clear_cache()
    timing.time_budgets(one, ROOMY, test_batches["nlp"][0], {3.6: own_window(MODEL.moe)}, rounds=1)
    timing._apply.clear_cache()
    assert seen == [True]

# SPDX-License-Identifier: Apache-2.0
"""Tests of report.py on made-up tables, which stay in a temporary folder. python3 -m unittest discover -s bench/gpu"""

import contextlib
import csv
import io
import pathlib
import sys
import tempfile
import unittest
from unittest import mock

import report

HEAD = "what,config,implementation,ms,tflops,gbps,share,form,chunk,memory_bytes,predicted_ms,mhz".split(",")


def row(what, config, ms, **more):
    return dict.fromkeys(HEAD, "0") | {"what": what, "config": config, "ms": str(ms), "form": ""} | more


def point(t, attention, chunked, planner, d=64, what="fwd+bwd", predicted=None):
    """The three rows of one length: times of both forms, and which the planner took."""
    name = f"bf16 p2 d{d} b{max(1, 65536 // t)} t{t} h8 gated"
    guess = predicted or (attention, chunked)
    return [
        row(what, f"{name} attention", attention, form="attention", predicted_ms=str(guess[0])),
        row(what, f"{name} chunked", chunked, form="chunked", predicted_ms=str(guess[1])),
        row(
            what, f"{name} planner", attention if planner == "attention" else chunked, form=planner, memory_bytes="5000"
        ),
    ]


def peer(t, ms, name="cudnn softmax", d=64, what="fwd+bwd"):
    return {
        "what": what,
        "config": f"bf16 d{d} b{max(1, 65536 // t)} t{t} h8",
        "name": name,
        "ms": str(ms),
        "memory_bytes": "7000",
    }


class Targets(unittest.TestCase):
    def judge(self, rows, label):
        return next(t for t in report.judge_targets(rows) if t[0] == label)

    def test_times_and_shares(self):
        rows = [
            row("forward", report.LONG, 0.9),
            row("fwd+bwd", report.LONG, 3.6),
            row("copy", "2 GiB", 1, gbps="3000"),
            row("in place", "2 GiB", 1, gbps="4000"),
            row("step", "f32 state d64 b*h256 tokens1 group1", 0.08, gbps="3201"),
            row("step", "f32 state d64 b*h192 tokens1 group1", 0.08, gbps="2799"),
        ]
        self.assertEqual(self.judge(rows, "p=2 d=64 t=65536, forward")[4], "met")
        self.assertEqual(self.judge(rows, "p=2 d=64 t=65536, forward + backward")[4], "MISSED")
        self.assertEqual(self.judge(rows, "step, b*h = 256")[4], "met")
        self.assertEqual(self.judge(rows, "step, b*h = 192")[4], "MISSED")
        self.assertEqual(self.judge(rows, "step, b*h = 8")[4], "not measured")

    def test_one_implementation_is_not_taken_for_another(self):
        rows = [row("forward", f"{report.LONG} only cuda.sm80", 1.7)]
        self.assertEqual(self.judge(rows, "p=2 d=64 t=65536, forward")[4], "not measured")
        self.assertEqual(self.judge(rows, "cuda.sm80 d=64 t=65536, forward")[4], "met")

    def test_a_share_of_an_unknown_rate_is_not_judged(self):
        rows = [row("step", "f32 state d64 b*h256 tokens1 group1", 0.08, gbps="3201")]
        self.assertEqual(self.judge(rows, "step, b*h = 256")[4], "no in-place rate")


class Sweep(unittest.TestCase):
    def test_planner(self):
        rows = point(1024, 1, 2, "attention") + point(2048, 2, 1.5, "attention") + point(4096, 3, 2.95, "attention")
        rows += point(8192, 6, 3, "chunked")[1:]  # the attention form failed
        right = {line["t"]: line["planner_right"] for line in report.sweep(rows, [])}
        self.assertEqual(right, {1024: "yes", 2048: "no", 4096: "tie", 8192: ""})

    def test_peers(self):
        rows = point(1024, 1, 2, "attention") + point(2048, 2, 1.5, "chunked") + point(4096, 3, 1.5, "chunked")
        peers = [peer(1024, 0.9), peer(2048, 2), peer(2048, 4, "flash softmax"), peer(4096, 9, d=128)]
        lines = {line["t"]: line for line in report.sweep(rows, peers)}
        self.assertEqual([lines[t]["slower_than_cudnn"] for t in (1024, 2048, 4096)], ["yes", "no", ""])
        self.assertEqual(
            (lines[2048]["flash_ms"], lines[2048]["cudnn_memory_bytes"], lines[2048]["memory_bytes"]), (4, 7000, 5000)
        )

    def test_sustained_load_stays_apart(self):
        name = "bf16 p2 d64 b16 t4096 h8 gated planner sustained"
        rows = [*point(4096, 2, 3, "attention"), row("fwd+bwd", name, 2.5, mhz="1590")]
        lines = report.sweep(rows, [peer(4096, 2.2), peer(4096, 2.4, "cudnn softmax sustained")])
        keys = ("planner_ms", "slower_than_cudnn", "sustained_ms", "sustained_mhz", "cudnn_sustained_ms")
        self.assertEqual([tuple(x[key] for key in keys) for x in lines], [(2, "no", 2.5, 1590, 2.4)])
        self.assertEqual(lines[0]["sustained_slower_than_cudnn"], "yes")
        (alone,) = report.sweep(rows[:3], [])
        self.assertEqual([alone[key] for key in keys], [2, "", "", "", ""])

    def test_directions_and_head_dims_stay_apart(self):
        rows = (
            point(1024, 1, 2, "attention")
            + point(1024, 5, 4, "chunked", what="forward")
            + point(1024, 3, 9, "attention", d=128)
        )
        got = [(x["d"], x["what"], x["planner_ms"]) for x in report.sweep(rows, [])]
        self.assertEqual(got, [(64, "forward", 4), (64, "fwd+bwd", 1), (128, "fwd+bwd", 3)])


class Crossover(unittest.TestCase):
    def test_between_two_lengths(self):
        t, text = report.crossover([(1024, 1, 2), (2048, 2, 2.83), (4096, 4, 2), (8192, 8, 2)])
        self.assertTrue(2048 < t < 4096, t)
        self.assertEqual(text, f"{t:.0f}")
        middle, _ = report.crossover([(1024, 1, 2), (4096, 2, 1)])  # equally far from 1 in logarithms
        self.assertAlmostEqual(middle, 2048)

    def test_one_form_always(self):
        self.assertEqual(report.crossover([(1024, 2, 1), (2048, 4, 1)]), (None, "chunks are faster from 1024 on"))
        self.assertEqual(report.crossover([(1024, 1, 3), (2048, 2, 3)]), (None, "attention is faster up to 2048"))
        self.assertEqual(report.crossover([]), (None, "not measured"))

    def test_measured_and_predicted(self):
        rows = (
            point(1024, 1, 2, "attention")
            + point(4096, 4, 2, "chunked", predicted=(3, 4))
            + point(16384, 9, 2, "chunked")
        )
        ((d, what, measured, predicted),) = report.crossovers(report.sweep(rows, []))
        self.assertEqual((d, what, measured), (64, "fwd+bwd", "2048"))
        self.assertTrue(4096 < float(predicted) < 16384, predicted)


class Whole(unittest.TestCase):
    def run_in(self, folder):
        out = io.StringIO()
        with contextlib.redirect_stdout(out), mock.patch.object(sys, "argv", ["report.py", str(folder)]):
            report.main()
        return out.getvalue()

    def test_tables(self):
        with tempfile.TemporaryDirectory() as name:
            folder = pathlib.Path(name)
            with self.assertRaises(SystemExit):
                self.run_in(folder)
            rows = [
                row("matmul", "8192^3 bf16", 1.4),
                row("forward", report.LONG, 0.9),
                *point(1024, 1, 2, "attention"),
            ]
            with open(folder / "gpu.csv", "w", newline="") as file:
                writer = csv.DictWriter(file, HEAD)
                writer.writeheader()
                writer.writerows(rows)
            self.assertIn("1 met, 0 missed", self.run_in(folder))
            with open(folder / "gpu-peers.csv", "w", newline="") as file:
                writer = csv.DictWriter(file, ("what", "config", "name", "ms", "memory_bytes"))
                writer.writeheader()
                writer.writerows([peer(1024, 0.9), peer(65536, 5.8, "retention p2", what="forward")])
            text = self.run_in(folder)
            self.assertIn("SLOWER", text)
            self.assertRegex(text, r"retention p2 +forward +bf16 d64 b1 t65536 h8 +5\.800 +0\.900 +6\.44")
            self.assertEqual([x["slower_than_cudnn"] for x in report.read(folder / "gpu-sweep.csv")], ["yes"])


if __name__ == "__main__":
    unittest.main()

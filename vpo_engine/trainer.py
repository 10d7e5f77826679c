"""The loop of a run around its method: evaluation, log, gallery, checkpoints, and the report at the end."""

from __future__ import annotations

import json
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from vpo_engine.checkpoint_size import checkpoint_bytes
from vpo_engine.config import Config
from vpo_engine.data.preference_dataset import truncate_dataset
from vpo_engine.data.prompts import Stream
from vpo_engine.distributed.processes import Processes
from vpo_engine.distributed.stopping import StepAbandonedError
from vpo_engine.ending import Outcome
from vpo_engine.errors import NotFiniteError
from vpo_engine.full_disk import write_whole
from vpo_engine.method import Method, Step, embed_prompts
from vpo_engine.metrics.held_out import HeldOut, logged
from vpo_engine.metrics.reward_monitor import RewardMonitor, describe_shuffle
from vpo_engine.metrics.step_watch import Alarm, StepWatch
from vpo_engine.metrics.summary import format_summary, summarise
from vpo_engine.metrics.throughput import Throughput, count_row_flops, matrix_rate
from vpo_engine.metrics.time_account import sum_rows
from vpo_engine.rewards.registry import reward_card
from vpo_engine.rollout.preference_dataset import PairRecorder
from vpo_engine.run_gallery import keep_held_out, keep_pairs, shown_clips
from vpo_engine.run_state import average_writer, capture, policy_writer, restore
from vpo_engine.runs.alarms import read_alarms, write_alarms
from vpo_engine.runs.checkpoint import load_checkpoint, newest_complete
from vpo_engine.runs.directory import RunDirectory
from vpo_engine.runs.disk_use import DiskWatch
from vpo_engine.runs.log import NullLog, RunLog, iterate_metrics
from vpo_engine.runs.next_steps import after_divergence, closing_lines
from vpo_engine.runs.progress import Progress
from vpo_engine.runs.report import write_report
from vpo_engine.runs.saving import CheckpointSaver
from vpo_engine.runs.signals import StopRequest, exit_code

_FULL = 2
"""The answer of processes that stop because the disk is full; 1: because one of them was asked to stop."""
_MEASURED_PROMPTS = 16
"""Held-out prompts whose mean length is taken for that of all prompts; embeddings are large, so these are few."""


class Trainer:
    """Run one process of a training run. Only the first process writes files, but all of them call every method."""

    def __init__(
        self,
        config: Config,
        algorithm: Method,
        stream: Stream,
        held_out: HeldOut,
        run: RunDirectory,
        processes: Processes,
        stop_elsewhere: Callable[[], bool] = lambda: False,
        start_from: Path | None = None,
    ) -> None:
        """``stop_elsewhere``: tells whether a process that does not train was asked to stop.

        ``start_from``: the checkpoint that the run goes on from; None to begin at the first step.
        """
        self._config, self._algorithm, self._stream = config, algorithm, stream
        self._held_out, self._run, self._processes = held_out, run, processes
        self._stop_elsewhere, self._start_from = stop_elsewhere, start_from
        held_out.stopping, held_out.whole_policy = algorithm.stopping, algorithm.optimizer.whole
        self._mine = processes.team_range(config.pairs_per_step, "pairs_per_step")
        self._seconds: dict[str, float] = defaultdict(float)
        self._stage_seconds: dict[str, float] = {}
        self._taken_at = time.perf_counter()
        self._baseline: dict[str, Tensor] = {}
        samples = config.evaluation.samples_per_prompt
        samples = min(samples, config.evaluation.samples_between or samples)
        with algorithm.optimizer.whole():
            size = checkpoint_bytes(config, algorithm.model)
        writers = processes.count if config.pairs.dataset == "latents" else 0
        self._disk = DiskWatch(run.root, size, config.disk.limit_gib, writers)
        self._monitor = RewardMonitor(config.guards, samples * len(held_out.prompts), StepWatch(config))
        self._alarmed = self._disk_is_full = self._evaluation_missing = False
        self._done = self._saved_at = self._resumed_at = 0
        self._where = "before the first step"
        self._last_metrics: Mapping[str, float] = {}

    def run(self) -> Outcome:
        """Train to the last step, or to the place where a signal stops the run; see ``StopPoints``."""
        total = self._config.steps
        self._log = log = RunLog(self._run, self._config.log.wandb) if self._processes.first else NullLog()
        with StopRequest(self._acknowledge) as stop:
            self._algorithm.stopping.requested = lambda: stop.requested
            start = self._done = self._resume()
            self._recorder = self._open_recorder(start)
            with (
                Progress(total, start, self._processes.first) as self._progress,
                CheckpointSaver(
                    self._run.checkpoints,
                    self._config.checkpoint,
                    self._processes.device,
                    self._progress.note,
                ) as self._saver,
            ):
                try:
                    self._prepare(start)
                    if self._alarmed and start < total:
                        return self._stopped(stop)
                    for step in range(start + 1, total + 1):
                        self._train_step(step)
                        if self._must_stop(stop) and step < total:
                            return self._stopped(stop)
                    return Outcome(total, self._finish(total))
                except StepAbandonedError:
                    return self._stopped(stop)
                except NotFiniteError as error:
                    raise ValueError(self._diverged(error)) from error
                finally:
                    log.close()

    def _prepare(self, start: int) -> None:
        """Do what comes before step ``start + 1``."""
        with self._stage("text"):
            self._progress.stage("encoding the text of the prompts")
            self._encode_text()
        self._throughput = self._measure_device()
        if self._config.ema.decay is not None:
            self._progress.note(
                f"held-out videos are sampled by the policy's moving average (ema.decay={self._config.ema.decay:g})"
            )
        self._raise_alarms([])
        self._algorithm.prepare(self._run.preference_dataset, self._progress.note)
        if start == 0:
            self._evaluate_baseline()
            return
        self._check_reward(exchange=False)
        if self._evaluation_missing:  # the run was stopped during the evaluation of its last step
            self._evaluate(start)

    def _must_stop(self, stop: StopRequest) -> bool:
        """Return whether the run must be saved and ended after the step that is done; the same in all processes."""
        watched = self._processes.first and self._done < self._config.steps and not self._saver.writing
        full = self._disk.exhausted(self._done) if watched else None
        if full is not None:
            self._progress.note(full)
        asked = stop.requested or self._stop_elsewhere()
        answer = self._processes.largest(_FULL if full is not None else int(asked))
        self._disk_is_full = answer == _FULL
        return answer > 0 or self._alarmed

    def _acknowledge(self, signal_name: str) -> str:
        """Return what the terminal shows when the run is asked to stop."""
        if not self._processes.first:
            return ""
        saving = f"then saving step {self._done}" if self._done else "with nothing to save yet"
        return f"{signal_name}: giving up what is not finished, {saving}; send it again to stop at once"

    def _stopped(self, stop: StopRequest) -> Outcome:
        """Save the last finished step, unless that is done, and say how the run ended."""
        step = self._done
        if step and self._saved_at != step:
            self._save(step)
        if self._disk_is_full:
            return Outcome(step, None, "a disk without room", exit_code=1)
        if not self._alarmed:
            name = stop.signal.name if stop.signal else "a signal to another process"
            return Outcome(step, None, name, exit_code=exit_code(stop.signal or signal.SIGTERM))
        if self._processes.first:
            self._progress.note(f"report: {write_report(self._run)}")
        self._saver.wait()
        self._processes.wait()  # torchrun ends all processes, the first too, when one ends with an error
        return Outcome(step, None, "an alarm (guards.on_alarm=stop)", exit_code=1, alarmed=True)

    def _diverged(self, error: NotFiniteError) -> str:
        """Return what is known about a policy that has diverged."""
        self._saver.settle()
        last, norm = newest_complete(self._run.checkpoints), self._last_metrics.get("grad_norm")
        return after_divergence(self._config, self._where, error, norm, last)

    def _open_recorder(self, start: int) -> PairRecorder | None:
        """Return what writes the run's preference dataset, without the steps after ``start``; one process of each team
        has it."""
        if self._config.pairs.dataset == "none":
            return None
        if self._processes.first:
            truncate_dataset(self._run.preference_dataset, start)
        self._processes.wait()
        if not self._processes.first_of_team:
            return None
        config, rank = self._config, self._processes.rank
        return PairRecorder(
            config.seed, self._run.preference_dataset, rank, config.pairs.dataset == "latents"
        )

    def _encode_text(self) -> None:
        """Encode all prompts of the run, also those of steps already done, since equal batches give equal bits."""
        count = min(self._config.steps * self._config.pairs_per_step, len(self._stream))
        prompts = [item.text for item in self._stream.take(0, count)]
        self._algorithm.model.prepare([*prompts, *self._held_out.prompts])

    def _measure_device(self) -> Throughput:
        """Measure what the device can do, and count what an input of the network costs; no step is charged for it."""
        start = time.perf_counter()
        self._progress.stage("measuring the device")
        model = self._algorithm.model
        with self._algorithm.optimizer.whole():
            flops = count_row_flops(model, model.embed(self._held_out.prompts[:_MEASURED_PROMPTS]))
        ceiling = matrix_rate(self._processes.device, getattr(torch, self._config.model.dtype))
        self._taken_at += time.perf_counter() - start
        return Throughput(flops, ceiling)

    def _train_step(self, step: int) -> None:
        self._where = f"in step {step}"
        self._processes.stages.begin_step(step)
        self._saver.check()
        first = (step - 1) * self._config.pairs_per_step
        positions = range(first + self._mine.start, first + self._mine.stop)
        texts = [item.text for item in self._stream.take(positions.start, len(positions))]
        with self._stage("text"):
            prompts = embed_prompts(self._algorithm.model, texts, positions)
        self._progress.stage("training")
        result = self._algorithm.step(prompts)
        self._stage_seconds |= result.seconds
        if self._processes.first:
            keep_pairs(self._config, self._algorithm.model, self._run, step, result)
        if self._recorder is not None:
            self._recorder.record(step, result.choices, result.pairs)
        self._log_step(step, result)
        if self._due(self._config.evaluation.every, step) and step < self._config.steps:
            self._evaluate(step)
        if self._due(self._config.checkpoint.every, step) or step == self._config.steps or self._alarmed:
            with self._stage("checkpoint"):
                self._save(step)

    def _log_step(self, step: int, result: Step) -> None:
        metrics = dict(result.metrics)
        seconds = self._take_seconds()
        metrics |= {f"seconds/{stage}": value for stage, value in seconds.items()}
        metrics |= self._throughput.rates(seconds, result.work)
        metrics |= self._throughput.utilisation(result.seconds, result.work)
        metrics["speed/ceiling"] = self._throughput.ceiling
        levels, alarms = self._monitor.step(step, result.metrics)
        self._log.write(step, "train", metrics | levels)
        self._progress.step(step, metrics)
        self._last_metrics, self._done = metrics, step
        self._raise_alarms(alarms)

    def _evaluate(self, step: int) -> None:
        """Evaluate the policy between the first and the last step."""
        self._where = f"in the evaluation after step {step}"
        settings = self._config.evaluation
        with self._stage("evaluate"):
            samples = settings.samples_between or settings.samples_per_prompt
            with self._algorithm.evaluated_weights():
                found = self._held_out.evaluate(self._algorithm.model.network, samples)
            self._log_evaluation(step, found)

    def _take_seconds(self) -> dict[str, float]:
        """Return the seconds of each stage and of everything since the last call.

        Evaluations and checkpoints after a step count to the next row.
        """
        now = time.perf_counter()
        seconds = {**self._stage_seconds, "step": now - self._taken_at}
        self._taken_at, self._stage_seconds = now, {}
        for stage, value in seconds.items():
            self._seconds[stage] += value
        return seconds

    def _timings(self) -> dict[str, float]:
        """Return the seconds of each stage over the whole run, with those that the log has of earlier starts."""
        if self._resumed_at and self._processes.first:  # the others write no summary
            rows = iterate_metrics(self._run.metrics)
            for stage, value in sum_rows(row for row in rows if int(row["step"]) <= self._resumed_at).items():
                self._seconds[stage] += value
        return dict(self._seconds)

    def _evaluate_baseline(self) -> None:
        with self._stage("evaluate"):
            self._progress.stage("evaluating the policy that the run starts from")
            network = self._algorithm.model.network
            self._baseline = self._held_out.evaluate(network, self._config.evaluation.samples_per_prompt)
            self._baseline["clips"] = self._sample_shown()
            shares = self._check_reward(exchange=reward_card(self._config.reward.kind).reads_prompt)
        self._log_evaluation(0, self._baseline, shares)

    def _check_reward(self, exchange: bool) -> dict[str, float]:
        """Check the reward on clips of the base policy. With ``exchange`` of prompts between them, return the shares
        that prefer their own."""
        clips = shown_clips(self._config, self._held_out)
        found = self._held_out.check_reward(self._baseline["clips"], clips, exchange)
        if not found:
            return {}
        self._progress.note(describe_shuffle(found))
        self._raise_alarms(self._monitor.prompts(found))
        return {f"guards/prompt/{name}": shuffled.share for name, shuffled in found.items()}

    def _raise_alarms(self, alarms: Sequence[Alarm]) -> None:
        for alarm in alarms:
            self._progress.note(f"ALARM after step {alarm.step}: {alarm.text}")
            self._alarmed |= alarm.stops and self._config.guards.on_alarm == "stop"
        if self._processes.first:
            write_alarms(self._run, [asdict(alarm) for alarm in self._monitor.alarms])

    def _finish(self, step: int) -> dict[str, object]:
        self._where = f"in the evaluation after step {step}"
        with self._stage("evaluate"):
            self._progress.stage("evaluating the trained policy")
            network = self._algorithm.model.network
            with self._algorithm.evaluated_weights():
                final = self._held_out.evaluate(network, self._config.evaluation.samples_per_prompt)
                clips = self._sample_shown()
        self._progress.stage("writing the report")
        self._take_seconds()
        self._log_evaluation(step, final)
        self._saver.wait()
        summary = summarise(logged(self._baseline), logged(final), self._timings(), self._config.ema.decay)
        if self._processes.first:
            write_whole(self._run.summary, json.dumps(summary, indent=1))
            before, model = self._baseline["clips"], self._algorithm.model
            keep_held_out(self._config, model, self._held_out, self._run, before, clips)
            self._progress.note(format_summary(summary))
            write_report(self._run)
            self._log.show_held_out(step)
            self._progress.note(closing_lines(self._run))
        self._processes.wait()
        return summary

    def _log_evaluation(
        self, step: int, measured: dict[str, Tensor], more: Mapping[str, float] | None = None
    ) -> None:
        means = {f"held_out/{name}": float(value.mean()) for name, value in logged(measured).items()}
        numbers, alarms = self._monitor.observe(step, self._baseline, measured)
        if self._algorithm.average is not None:  # these numbers are the average's
            numbers = {**numbers, "ema/decay": self._algorithm.average.decay}
        self._raise_alarms(alarms)  # before the row, by which the next start takes the evaluation for made
        self._log.write(step, "eval", means | numbers | dict(more or {}))
        self._log.show_samples(step, self._held_out.prompts, self._held_out.kept, self._algorithm.model.fps)

    def _sample_shown(self) -> Tensor:
        """Sample the held-out clips that the report shows."""
        clips = shown_clips(self._config, self._held_out)
        return self._held_out.videos(self._algorithm.model.network, clips).cpu()

    def _save(self, step: int) -> None:
        self._saved_at = step
        self._log.sync()  # a power cut must not leave the checkpoint without the rows and pairs before it
        if self._recorder is not None:
            self._recorder.sync()
        self._processes.wait()
        with self._algorithm.optimizer.whole():
            copies = self._saver.begin(step) if self._processes.first else None
            snapshot = capture(self._algorithm, step, self._baseline)
            snapshot["state"]["guards"] = self._monitor.state()
            if self._processes.first:
                policy = policy_writer(self._algorithm.model, copies)
                average = average_writer(self._algorithm, copies)
                self._saver.save(step, **snapshot, write_policy=policy, write_average=average)
        self._processes.wait()

    def _resume(self) -> int:
        """Restore the checkpoint that the run goes on from, and return its step; 0 without one."""
        total = self._config.steps
        if self._start_from is None:
            self._log.resume(0, total)
            return 0
        checkpoint = load_checkpoint(self._start_from)
        step, self._baseline = restore(
            self._algorithm, checkpoint.tensors, checkpoint.state, checkpoint.policy, checkpoint.average
        )
        self._monitor.load(checkpoint.state.get("guards", RewardMonitor.NOTHING))
        self._saved_at = self._resumed_at = step
        due = self._due(self._config.evaluation.every, step) and step < total
        made = self._log.resume(step, total)
        # An evaluation after the save may have raised more; one that is made again raises its own again.
        known = (read_alarms(self._run) or ()) if self._processes.first else ()
        later = [[each for each in known if each["step"] <= step - (due and not made)], made]
        alarms, evaluation = json.loads(self._processes.broadcast_text(json.dumps(later)))
        self._evaluation_missing = due and not evaluation
        self._monitor.recall(alarms, evaluation if due else None)
        return step

    @staticmethod
    def _due(every: int | None, step: int) -> bool:
        return every is not None and step % every == 0

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        self._progress.stage(name)
        start = time.perf_counter()
        with self._processes.stages(name):
            yield
            if self._processes.device.type == "cuda":
                torch.cuda.synchronize(self._processes.device)
        self._stage_seconds[name] = self._stage_seconds.get(name, 0.0) + time.perf_counter() - start

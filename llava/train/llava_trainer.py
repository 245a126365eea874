"""transformers' Trainer with LLaVA's parameter groups, named losses and layout on disk."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, IntervalStrategy, rotate_checkpoints, seed_worker

from llava.data.bad_samples import BadSampleLedger
from llava.data.sampler import BalancedBatchSampler
from llava.model.loading import ADAPTER_FILE, load_adapter_file
from llava.model.sharding import gathered, is_sharded
from llava.train.checkpoints import check_saved_weights, load_auxiliary_losses, save_adapter, save_auxiliary_losses
from llava.train.evaluation import Evaluation, undisturbed, validation_losses
from llava.train.flops import ModelFlops, peak_tflops
from llava.train.intervals import OwnIntervals
from llava.train.lora import has_lora, load_lora, save_lora, saved_tensors
from llava.train.metrics import MetricsFile, ShardedNorms, Throughput, gradient_norms, peak_memory_gib
from llava.train.output_folder import flush
from llava.train.parts import AUXILIARY, parameter_groups
from llava.train.preemption import StopOnSigterm

logger = logging.getLogger(__name__)


class NonFiniteError(ValueError):
    """A loss or gradient is inf or nan: what follows would be lost."""


class LLaVATrainer(Trainer):
    """Trains the parts that require gradients; sums and logs whatever named losses the model returns.

    Args:
        learning_rates: per part that trains (`llava.train.parts`).
        bad_samples: counts what the collator dropped, and aborts above its rate.
    """

    def __init__(self, *args: Any, learning_rates: dict[str, float], bad_samples: BadSampleLedger, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.learning_rates = learning_rates
        self.bad_samples = bad_samples
        self.adapter_only = set(learning_rates) <= {"mm_mlp_adapter", AUXILIARY}
        self.preemption = StopOnSigterm(self.sum_over_processes)
        self.add_callback(self.preemption)
        self.add_callback(OwnIntervals())
        self.add_callback(MetricsFile())
        self._throughput = Throughput()
        self._flops = ModelFlops(self.model)
        self._sharded_norms: ShardedNorms | None = None
        self._largest_pack = self.args.model_max_length * self.args.train_batch_size  # in tokens, of a micro-batch
        self._of_parts: dict[str, float | Tensor] = {}  # what each trained with at the last logged step
        self._ids: list[str] = []  # of the step's samples
        self._eval_loader: DataLoader | None = None
        self._named_sums: dict[str, Tensor] = {}  # (2,): a total, and what it is divided by; of a loss, steps

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            model = self.model if model is None else model
            groups = parameter_groups(
                model, self.learning_rates, self.args.weight_decay, set(self.get_decay_parameter_names(model))
            )
            optimizer_class, kwargs = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = optimizer_class(groups, **kwargs)
            if self.is_deepspeed_enabled:
                self._sharded_norms = ShardedNorms(self.optimizer)
        return self.optimizer

    def get_train_dataloader(self) -> DataLoader:
        """This process's micro-batches. The sampler has dealt them out, so accelerate, which where they do not suffice
        for all processes would repeat some, only moves them to the device."""
        args = self.args
        self._batches = BalancedBatchSampler(
            self.train_dataset.modality_lengths,
            batch_size=self._train_batch_size,
            rank=args.process_index,
            num_ranks=args.world_size,
            turns=args.gradient_accumulation_steps,
            by_modality=args.group_by_modality_length,
            max_pack=args.model_max_length if args.pack_to_max_length else None,
            seed=args.seed if args.data_seed is None else args.data_seed,
            drop_last=args.dataloader_drop_last,
        )
        if args.pack_to_max_length:
            logger.info("Packed: %s", self._batches.packing())
        loader = self._loader(self.train_dataset, self._batches, "--data_path")
        return prepare_data_loader(loader, args.device, num_processes=1, process_index=0, put_on_device=True)

    def get_eval_dataloader(self, *_: Any) -> DataLoader:
        """This process's share of the held-out micro-batches, the same at every evaluation. All processes have as many,
        and every sample is in one of them."""
        if self._eval_loader is None:
            args = self.args
            batches = BalancedBatchSampler(
                self.eval_dataset.modality_lengths,
                batch_size=args.eval_batch_size,
                rank=args.process_index,
                num_ranks=args.world_size,
            )
            self._eval_loader = self._loader(self.eval_dataset, batches, "--eval_data_path")
        return self._eval_loader

    def _loader(self, dataset: Dataset, batches: BalancedBatchSampler, flag: str) -> DataLoader:
        args, fingerprint = self.args, batches.fingerprint()
        if self.sum_over_processes([fingerprint]) != [fingerprint * args.world_size]:
            raise ValueError(
                "The processes do not have the same data: other records, another order or other lengths. Compare the "
                f"files of {flag} and the tokenizer on all nodes."
            )
        return DataLoader(
            dataset,
            batch_sampler=batches,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            worker_init_fn=partial(seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index),
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            in_order=args.dataloader_in_order,
        )

    def get_total_train_batch_size(self, args: Any) -> int:
        """In samples, of which a pack has several, on average."""
        return round(super().get_total_train_batch_size(args) * self._batches.samples_per_pack)

    def get_batch_samples(self, *args: Any) -> tuple[list[dict[str, Any]], Tensor | int | None]:
        """The micro-batches of one step, with their bad samples counted over all processes and taken out."""
        start = time.perf_counter()
        batches, num_items_in_batch = super().get_batch_samples(*args)
        waited = time.perf_counter() - start
        tokens_per_image = self.accelerator.unwrap_model(self.model).get_model().tokens_per_image
        flops = sum(map(self._flops.of_batch, batches)) + self._flops.of_supervised(self._own_share(num_items_in_batch))
        self._throughput.add(batches, tokens_per_image, waited=waited, flops=flops)
        bad = [sample for batch in batches for sample in batch.pop("bad_samples")]
        seen = sum(batch.pop("num_samples") for batch in batches)
        self._ids = [sample_id for batch in batches for sample_id in batch.pop("ids")]
        self.bad_samples.update(bad, num_seen=seen, over_processes=self.sum_over_processes)
        if self.args.pack_to_max_length:
            self._note_large_packs(batches)
        return batches, num_items_in_batch

    def _own_share(self, num_items_in_batch: Tensor | int | None) -> Tensor | float:
        """This process's mean part of the supervised tokens, left on the device: asking for them would make it wait."""
        ranks = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return 0.0 if num_items_in_batch is None else num_items_in_batch / ranks

    def _note_large_packs(self, batches: list[dict[str, Any]]) -> None:
        """Packs are made by estimated lengths. Who runs out of memory must see it where they are larger than meant."""
        largest = max((batch["input_ids"].numel() for batch in batches), default=0)
        if largest > self._largest_pack:
            logger.warning(
                "A micro-batch of %d tokens, more than the %d that --pack_to_max_length aims at: lengths are "
                "estimates, and rough ones for images of unlike sizes. If memory runs out, lower --model_max_length.",
                largest,
                self.args.model_max_length * self.args.train_batch_size,
            )
            self._largest_pack = largest

    def sum_over_processes(self, counts: list[int]) -> list[int]:
        if self.args.world_size == 1:
            return counts
        return self.accelerator.reduce(torch.tensor(counts, device=self.args.device)).tolist()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """L = L_dec + Σ weight · auxiliary (paper, Sec. 2.4).

        L_dec is a mean over the supervised tokens of the whole batch, so its micro-batch shares simply add up; over
        ranks they are summed too, against the averaging of gradients. An auxiliary loss is a mean per micro-batch, and
        then over the micro-batches of a step.
        """
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch)
        weights = self.accelerator.unwrap_model(model).auxiliary_weights
        ranks = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        share = 1 / self.current_gradient_accumulation_steps
        scales = dict.fromkeys(self._trained_losses(), share)
        scales["decoding"] = ranks if num_items_in_batch is not None else share
        values = {name: scale * outputs.losses[name] for name, scale in scales.items()}
        pairs = {name: torch.stack((value, torch.full_like(value, share))) for name, value in values.items()}
        for name, pair in (outputs.losses | pairs).items():
            self._named_sums[name] = self._named_sums.get(name, 0.0) + pair.detach()
        loss = values["decoding"] + sum(weight * values[name] for name, weight in weights.items())
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        self.loss_is_scaled_for_ga = True  # compute_loss above has divided where a division is due
        if self._sharded_norms is not None:  # DeepSpeed's optimizer steps in there
            self._sharded_norms.wanted = self._will_log()
        return super().training_step(*args, **kwargs)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        self._note_parts(model)
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Ends the run before a loss or gradient that is no number reaches the weights; under DeepSpeed, whose step is
        over by now, before it reaches a checkpoint."""
        if grad_norm is None:  # nothing was clipped
            self._note_parts(model)
        grad_norm = super()._get_grad_norm(model, grad_norm)
        if self._sharded_norms is not None and self._will_log():
            self._of_parts |= self._sharded_norms.take(self.learning_rates, float(grad_norm), self.accelerator.reduce)
        values = {f"loss_{name}": self._named_sums[name][0] for name in self._trained_losses()}
        values["grad_norm"] = grad_norm
        wrong = [name for name, value in values.items() if value is not None and not math.isfinite(value)]
        if wrong:
            raise NonFiniteError(
                f"Step {self.state.global_step + 1}: {' and '.join(wrong)} is not finite. Its samples on this process: "
                f"{', '.join(self._ids)}. Look at them, or lower the learning rate; the same command goes on from the "
                "last checkpoint."
            )
        return grad_norm

    def _note_parts(self, model: nn.Module) -> None:
        """Of a step that will be logged: what each part trains with, before clipping and before the schedule's step."""
        if self._will_log():
            groups = self.optimizer.param_groups
            rates = {f"learning_rate_{group['name'].removesuffix('_no_decay')}": group["lr"] for group in groups}
            self._of_parts = rates | gradient_norms(model)

    def _will_log(self) -> bool:
        """Whether the step that is being made will be logged, as transformers' DefaultFlowCallback decides."""
        step, args = self.state.global_step + 1, self.args
        if step == 1 and args.logging_first_step:
            return True
        if args.logging_strategy == IntervalStrategy.EPOCH:
            steps_of_epoch = math.ceil(len(self._batches) / args.gradient_accumulation_steps)
            return step % steps_of_epoch == 0 or step == self.state.max_steps
        return step % self.state.logging_steps == 0

    def _trained_losses(self) -> list[str]:
        return ["decoding", *self.accelerator.unwrap_model(self.model).auxiliary_weights]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds to the Trainer's own values, of the steps since the last log: every named loss as a mean, the learning
        rate and gradient norm of each part, and how fast it went."""
        if "loss" in logs and self._named_sums:
            names = sorted(self._named_sums)
            sums = self.accelerator.reduce(torch.stack([self._named_sums[name] for name in names]), reduction="mean")
            losses = self._trained_losses()
            for name, (total, count) in zip(names, sums.tolist(), strict=True):
                if count:  # no sample took part: there is nothing to say of them
                    logs[f"loss_{name}" if name in losses else name] = total / count
            self._named_sums = {}
            logs |= {name: float(value) for name, value in self._of_parts.items()}
            logs |= self._throughput.since_last(self.sum_over_processes)
            logs["peak_memory_gib"] = peak_memory_gib()
            peak = peak_tflops(torch.cuda.get_device_name()) if self.args.bf16 and torch.cuda.is_available() else None
            if peak:
                logs["mfu"] = logs["tflops_per_second"] / peak
        super().log(logs, start_time)

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """For what training must not notice, its clock included."""
        with self._throughput.paused(), undisturbed(self.model), self.compute_loss_context_manager():
            yield

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Losses of `--eval_data_path`, logged as `eval_decoding_loss` and so on. Every process calls."""
        ledger = BadSampleLedger(self.bad_samples.max_bad_samples, len(self.eval_dataset))
        with self._aside():
            values = validation_losses(
                self.model,
                self._held_out(ledger),
                run=lambda batch: self.model_wrapped(**batch).losses,
                weights=self.accelerator.unwrap_model(self.model).auxiliary_weights,
                total=lambda sums: self.accelerator.reduce(sums.to(self.args.device)),
            )
        values["samples"] = ledger.num_seen - ledger.num_bad
        values = {f"eval_{name}": value for name, value in values.items()}
        self.log(values)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, values)
        return values

    def _held_out(self, ledger: BadSampleLedger) -> Iterator[dict[str, Any]]:
        """The micro-batches on the device; then the bad samples among them are counted."""
        bad, seen = [], 0
        for batch in self.get_eval_dataloader():
            bad += batch.pop("bad_samples")
            seen += batch.pop("num_samples")
            batch.pop("ids")
            yield self._prepare_inputs(batch)
        ledger.update(bad, num_seen=seen, over_processes=self.sum_over_processes)

    def run_task(self, task: Evaluation) -> dict[str, float]:
        """A task of `--eval_tasks` on the model as it is. Every process calls."""
        with self._aside():
            return task(self.accelerator.unwrap_model(self.model))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """LLaVA's layouts: LoRA's, or the adapter alone where nothing else trained, or the model. Every process calls.

        A checkpoint in the middle of a run (`_internal_call`) also keeps what the losses have learnt; DeepSpeed's own
        files have it already.
        """
        folder = output_dir or self.args.output_dir
        if has_lora(self.model):
            with gathered(saved_tensors(self.model).values()):
                if self.args.should_save:
                    save_lora(self.model, folder)
                    self.processing_class.save_pretrained(folder)
        elif not self.adapter_only:
            super().save_model(folder, _internal_call)
        else:
            projector = self.model.get_model().mm_projector
            with gathered(projector.parameters()):
                if self.args.should_save:
                    save_adapter(projector, self.model.config, folder)
                    self.processing_class.save_pretrained(folder)
        if self.args.should_save:
            if _internal_call and not self.is_deepspeed_enabled:
                save_auxiliary_losses(self.model.auxiliary_losses, folder)
            check_saved_weights(folder, self.model, adapter_only=self.adapter_only)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """DeepSpeed's state dict is needed for shards only: of whole weights it is a copy whose tied ones are apart."""
        super()._save(output_dir, state_dict if is_sharded(self.model) else None)

    def _save_rng_state(self, output_dir: str) -> None:
        """Waits for all processes' files: next, the first one writes the file that marks the checkpoint as complete."""
        super()._save_rng_state(output_dir)
        flush(output_dir)
        self.args.save_total_limit = None  # only now: training_args.bin, which has it, is written
        self.accelerator.wait_for_everyone()

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """An older checkpoint is deleted only when the new one, its mark too, is on the disk."""
        limit = self.args.save_total_limit
        try:
            super()._save_checkpoint(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            flush(Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
            rotate_checkpoints(self.args.output_dir, limit, self.state.best_model_checkpoint, use_mtime=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if has_lora(self.model):
            load_lora(self.model, resume_from_checkpoint)
        elif not self.adapter_only:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            file = Path(resume_from_checkpoint) / ADAPTER_FILE
            load_adapter_file((model or self.model).get_model().mm_projector, file)
        load_auxiliary_losses(self.model.auxiliary_losses, resume_from_checkpoint)

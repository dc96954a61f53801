"""Names that other libraries give to our knobs, for the hint after a name that is not ours.

They are those of timm's and torchvision's training scripts, Keras, Hugging Face, MMPretrain and big_vision.
"""

from collections.abc import Collection

from ekd_jax.common.errors import nearest

# Our knobs, with the names that others have for them.
OTHER_NAMES = {
    "seed": "random_seed random_state rng_seed manual_seed trial",
    "model.name": "arch architecture backbone net network model_s student_model model_name",
    "model.students": "num_students num_branches branches",
    "model.dropout": "drop drop_rate dropout_rate",
    "model.stochastic_depth": "drop_path drop_path_rate drop_connect drop_connect_rate",
    "model.initial_weights": "pretrained weights checkpoint initial_checkpoint init_checkpoint load_from finetune",
    "model.frozen_stages": "freeze freeze_layers freeze_backbone frozen_layers freeze_at trainable_layers",
    "model.batch_norm": "sync_bn syncbn synchronized split_bn",
    "model.batch_norm_epsilon": "bn_eps",
    "method.name": "distill distillation algorithm",
    "method.temperature": "t kd_t kd_temperature temp tau",
    "method.teachers": "teacher path_t teacher_path teacher_checkpoint model_t",
    "data.name": "dataset dataset_name data_set",
    "data.data_dir": "data_path data_root root dataroot path dataset_dir data_folder",
    "data.validation_examples": "validation_split val_split val_size valid_size validation_size num_val",
    "data.test_split": "test_set split",
    "data.train_examples": "num_train num_samples max_samples subset",
    "data.image_size": "img_size imgsz input_size resolution train_crop_size size",
    "data.crop_padding": "pad crop_pad",
    "data.rotation": "degrees rotate rotation_range",
    "data.flip": "hflip horizontal_flip fliplr random_flip",
    "data.policy": "aa auto_augment autoaugment augment randaug",
    "data.policy_magnitude": "ra_magnitude randaug_magnitude",
    "data.policy_operations": "ra_ops num_ops randaug_num_layers",
    "data.std": "stddev var",
    "data.cutout": "reprob random_erase random_erasing erasing cutout_length",
    "data.mixup": "mixup_alpha mixup_p",
    "data.label_smoothing": "smoothing label_smooth label_smoothing_factor smooth_factor",
    "data.sampler": "weighted_sampler balanced_sampler weighted_random_sampler class_balanced oversample",
    "data.workers": "num_workers n_workers workers_per_gpu dataloader_num_workers j",
    "optimizer.name": "opt optim optimizer_type optax_name",
    "optimizer.learning_rate": "lr base_lr init_lr initial_lr lr0 rate eta blr",
    "optimizer.reference_batch_size": "lr_base_size base_batch_size auto_scale_lr nbs",
    "optimizer.warmup_epochs": "warmup lr_warmup_epochs warmup_steps warmup_iters num_warmup_steps warmup_ratio",
    "optimizer.momentum": "momentum mom",
    "optimizer.nesterov": "use_nesterov",
    "optimizer.b1": "beta1 beta_1 adam_beta1 betas opt_betas",
    "optimizer.b2": "beta2 beta_2 adam_beta2",
    "optimizer.epsilon": "eps opt_eps adam_epsilon",
    "optimizer.weight_decay": "wd decay l2 l2_reg weight_penalty kernel_regularizer",
    "optimizer.decay_norm_and_bias": (
        "norm_weight_decay bias_weight_decay norm_decay_mult bias_decay_mult exclude_from_weight_decay"
    ),
    "optimizer.clip_norm": (
        "clip clip_grad clip_grad_norm grad_clip grad_clip_norm gradient_clip_val gradient_clipping max_grad_norm "
        "max_norm clipnorm global_clipnorm"
    ),
    "optimizer.schedule": "sched scheduler lr_scheduler lr_schedule lr_policy lr_scheduler_type decay_type",
    "optimizer.final_learning_rate": "min_lr lr_min eta_min lrf final_lr end_lr",
    "optimizer.milestones": "lr_steps lr_decay_epochs decay_milestones schedule_epochs steps",
    "optimizer.decay_factor": "gamma lr_gamma decay_rate lr_decay_rate lr_decay",
    "optimizer.decay_every_epochs": "decay_epochs lr_step_size step_size",
    "train.epochs": (
        "num_epochs n_epochs max_epochs total_epochs nepochs num_train_epochs total_steps max_steps train_steps"
    ),
    "train.batch_size": (
        "batch_size b bs batch batchsize train_batch_size samples_per_gpu per_device_train_batch_size"
    ),
    "train.accumulation_steps": "grad_accum grad_accum_steps gradient_accumulation_steps accumulate accum_iter",
    "train.rematerialize": "remat grad_checkpointing gradient_checkpointing checkpoint_activations",
    "train.ema_decay": "ema model_ema ema_momentum use_ema model_ema_decay moving_average_decay",
    "train.dtype": "amp fp16 bf16 half mixed_precision precision amp_dtype dtype_policy use_amp",
    "train.patience_epochs": "patience early_stopping early_stop early_stopping_patience",
    "train.class_weights": "class_weight cls_weights loss_weights pos_weight",
    "train.log_every_steps": "log_interval print_freq log_every log_training_steps logging_steps disp_freq",
    "train.evaluate_every_epochs": "eval_interval eval_freq eval_every val_interval validation_freq eval_steps",
    "train.checkpoint_every_epochs": "save_freq save_every checkpoint_interval save_interval ckpt_steps save_steps",
    "evaluate.batch_size": "eval_batch_size val_batch_size validation_batch_size test_batch_size vb",
}
# What is no knob here.
OTHER_WAYS = {
    "runs use all devices that JAX sees; CUDA_VISIBLE_DEVICES or JAX_PLATFORMS limits them": (
        "gpu gpus gpu_id device devices num_gpus n_gpu local_rank cuda no_cuda use_cuda accelerator ngpus"
    ),
    "start the same command in every process (docs/scale.md)": (
        "world_size rank dist_url dist_backend distributed launcher multiprocessing_distributed backend"
    ),
    "the directory of a run is --workdir=DIR": (
        "output output_dir out_dir save_dir work_dir log_dir logdir exp_name experiment save_path model_dir"
    ),
    "the same command resumes the run in --workdir": "resume resume_from auto_resume start_epoch",
    "the number of classes is that of the data": "num_classes n_classes classes n_cls nb_classes",
}


def _index(table: dict[str, str]) -> dict[str, str]:
    return {name: ours for ours, names in table.items() for name in names.split()}


_KNOB_BY_NAME, _WAY_BY_NAME = _index(OTHER_NAMES), _index(OTHER_WAYS)


def find_knob(path: str, known: Collection[str]) -> str:
    """Return the knob that a name from elsewhere stands for, "" if that is not known.

    Args:
        path: with or without a section, such as "train.lr", "batch-size" or "clip_grad".
        known: the knobs there are.
    """
    name = _last(path)
    same = [knob for knob in known if _last(knob) == name]
    if len(same) == 1:
        return same[0]
    ours = _KNOB_BY_NAME.get(name, "")
    return ours if ours in known else ""


def hint(path: str, known: Collection[str]) -> str:
    """Return what the user of an unknown knob may mean, to be added to the error."""
    knob = find_knob(path, known)
    if knob:
        return f"; did you mean {knob!r}?"
    same = [knob for knob in known if _last(knob) == _last(path)]
    return other_way(path) or nearest(path, same or known)


def other_way(path: str) -> str:
    """Return how to do what a name from elsewhere does that is no knob here, "" if that is not known."""
    way = _WAY_BY_NAME.get(_last(path))
    return f"; {way}" if way else ""


def _last(path: str) -> str:
    return path.rpartition(".")[2].lower().replace("-", "_")

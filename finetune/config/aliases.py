"""Names that other programs use for a run's fields, and what they are called here.

>>> hint("lr"), hint("lerning_rate")
('the field is learning_rate', None)
"""

import re
from collections.abc import Iterable

from finetune.system.text import nearest

ALIASES = {
    "model": "model_name model_type model_arch arch architecture backbone network net base_model",
    "strategy": "finetune_strategy finetuning_strategy freeze_strategy training_strategy",
    "epochs": "n_epochs num_epochs max_epochs epoch num_train_epochs epochs_num",
    "batch_size": "bs batch train_batch_size per_device_train_batch_size minibatch_size",
    "data_aug": "augmentation augment augmentations aug augs data_augmentation use_augmentation "
    "augment_data use_aug transforms",
    "learning_rate": "lr learn_rate base_lr init_lr initial_lr max_lr lr0 eta0 head_lr lrate",
    "optimizer": "optim opt optimiser optimizer_name",
    "momentum": "sgd_momentum",
    "mixup": "mixup_alpha",
    "class_weights": "class_weight balanced_classes weighted_loss",
    "lr_decay": "layer_decay layerwise_lr_decay discriminative_lr lr_mult backbone_lr_factor",
    "lr_schedule": "scheduler lr_scheduler schedule lr_scheduler_type lr_policy sched",
    "weight_decay": "wd l2 l2_reg l2_regularization l2_penalty decay",
    "label_smoothing": "smoothing smooth label_smooth",
    "unfreeze_from": "unfreeze unfreeze_layer unfreeze_layers unfrozen_layers trainable_layers "
    "num_unfrozen_layers freeze_until freeze_layers layers_to_freeze",
    "unfreeze_every": "unfreeze_interval unfreeze_epochs unfreeze_schedule",
    "image_size": "img_size imgsz input_size im_size resolution resize crop_size",
    "data_dir": "dataset data data_path dataset_path dataset_dir data_root dataset_root root "
    "image_dir dataset_name",
    "val_fraction": "val_split validation_split valid_split val_size val_ratio test_size "
    "split_ratio valid_pct",
    "weights": "pretrained use_pretrained pretrained_weights weights_path checkpoint ckpt "
    "ckpt_path checkpoint_path init_weights",
    "patience": "early_stopping early_stop early_stopping_patience es_patience",
    "seed": "random_seed random_state rng_seed manual_seed",
    "cache_dir": "cache_path",
    "accelerator": "device gpu cuda use_gpu use_cuda",
    "precision": "amp fp16 bf16 use_amp mixed_precision half_precision",
    "out": "output output_dir out_dir save_dir log_dir logdir results_dir runs_dir "
    "checkpoint_dir default_root_dir",
    "project": "wandb_project project_name",
    "entity": "wandb_entity team",
    "group": "wandb_group",
    "name": "run_name wandb_name exp_name experiment experiment_name",
    "resume": "resume_from resume_from_checkpoint",
    "config": "config_file config_path cfg",
}
NO_FIELD = {
    "the layers are those of the network, which `model` names": "activation kernel_size "
    "num_filters filters batch_norm dense_size hidden_size fc_size num_layers",
    "dropout is what the network has; weight_decay, label_smoothing, data_aug and mixup regularize "
    "too": "dropout dropout_rate drop_rate dropout_p drop_path",
    "the classes are the folders in data_dir": "num_classes n_classes nb_classes classes "
    "class_names num_labels",
    "the optimizers are used with learning_rate, momentum and weight_decay, else with torch's "
    "defaults": "beta1 beta2 betas eps nesterov",
    "the loss is cross-entropy, with label_smoothing and class_weights": "loss criterion loss_fn",
    "a run reads pictures from its cache, without worker processes": "num_workers "
    "workers n_workers dataloader_num_workers",
    "lr_schedule onecycle starts with a warm-up": "warmup warmup_epochs warmup_steps warmup_ratio",
    "a run uses one device; `python -m finetune gpus` and `sweep --workers` use several": "gpus "
    "devices num_gpus n_gpus gpu_ids world_size",
}


def _plain(name: str) -> str:
    """The name without what is a matter of spelling: case, hyphens, underscores."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _by_alias(table: dict[str, str]) -> dict[str, str]:
    return {_plain(alias): meant for meant, aliases in table.items() for alias in aliases.split()}


_FIELD_OF, _REASON_OF = _by_alias(ALIASES), _by_alias(NO_FIELD)


def field_of(name: str, fields: Iterable[str] = ()) -> str | None:
    """The field that is meant by this name, in any spelling; None if it is not known."""
    spellings = _FIELD_OF | {_plain(field): field for field in fields}
    return spellings.get(_plain(name))


def hint(name: str, fields: Iterable[str] = ()) -> str | None:
    """Which field is meant by a name, or why there is none; None if it is not known."""
    if field := field_of(name, fields):
        return f"the field is {field}"
    reason = _REASON_OF.get(_plain(name))
    return reason and f"there is no such field; {reason}"


def unknown_field(name: str, fields: Iterable[str]) -> str:
    """The message for a name that is not one of the fields, with the field that it may mean."""
    names = [*fields, *(flags := ("config", "resume"))]
    known = "it is a flag of agent.py" if name in flags else hint(name, names)
    if known:
        return f"unknown field {name!r}: {known}"
    return f"unknown field {name!r}{nearest(name, names) or ' (see agent.py --help)'}"

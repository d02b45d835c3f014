"""trl's flags for the model (`ModelConfig`) and the data (`ScriptArguments`, `DatasetMixtureConfig`), and our own."""

from __future__ import annotations

from functools import partial

from sapo.options.declare import Option

_model = partial(Option, kind="model", section="Model")
_lora = partial(Option, kind="model", section="LoRA and quantization", needs="use_peft")
_quantization = partial(Option, kind="model", section="LoRA and quantization")
_data = partial(Option, kind="data", section="Data")

MODEL: tuple[Option, ...] = (
    _model("model_name_or_path", None, "Model to train: a folder or a Hub id. Start from a supervised fine-tuned "
           "model.", type="str", optional=True, common=True),
    _model("model_revision", "main", "Branch, tag or commit of a model on the Hub.", type="str"),
    _model("dtype", "float32", "Data type of the model's weights; auto is that of the checkpoint.", type="str",
           optional=True, choices=("auto", "bfloat16", "float16", "float32")),
    _model("attn_implementation", None, "Attention kernel: sdpa, eager, flash_attention_2 (pip install flash-attn), "
           "... Unset: transformers' choice.", type="str", optional=True),
    _quantization("use_peft", False, "Train a LoRA adapter instead of all weights.", type="bool", common=True),
    _lora("lora_r", 16, "Rank of the LoRA adapter.", type="int", low=1, common=True),
    _lora("lora_alpha", 32, "Scale of the LoRA adapter: its output is multiplied by lora_alpha / lora_r.", type="int"),
    _lora("lora_dropout", 0.05, "Dropout of the LoRA adapter's input.", type="float", low=0, high=1),
    _lora("lora_target_modules", None, "Modules that get an adapter, by name, or all-linear. Unset: peft's choice for "
          "the architecture.", type="list", optional=True),
    _lora("lora_target_parameters", None, "Parameters that get an adapter, by name, such as those of experts.",
          type="list", optional=True),
    _lora("lora_modules_to_save", None, "Modules that are trained in full beside the adapter.", type="list",
          optional=True),
    _lora("lora_task_type", "CAUSAL_LM", "Task type of the adapter, as peft names it.", type="str",
          status="harmless"),
    _lora("use_rslora", False, "Scale the adapter by lora_alpha / sqrt(lora_r).", type="bool"),
    _lora("use_dora", False, "Use DoRA: direction and magnitude of the weights are adapted separately.", type="bool"),
    _quantization("load_in_8bit", False, "Load the frozen weights in 8 bits (bitsandbytes).", type="bool",
                  needs="use_peft"),
    _quantization("load_in_4bit", False, "Load the frozen weights in 4 bits (bitsandbytes).", type="bool", common=True,
                  needs="use_peft"),
    _quantization("bnb_4bit_quant_type", "nf4", "Data type of 4-bit weights.", type="str", choices=("fp4", "nf4"),
                  needs="load_in_4bit"),
    _quantization("use_bnb_nested_quant", False, "Quantize the quantization constants too.", type="bool",
                  needs="load_in_4bit"),
    _quantization("bnb_4bit_quant_storage", None, "Data type in which 4-bit weights are stored.", type="str",
                  optional=True, needs="load_in_4bit"),
)  # fmt: skip

DATA: tuple[Option, ...] = (
    _data("dataset_name", None, "Training data: a file (JSONL, Parquet, CSV, ...), a folder or a Hub id.", type="str",
          optional=True, common=True),
    _data("dataset_config", None, "Configuration of a Hub dataset.", type="str", optional=True),
    _data("dataset_train_split", "train", "Split of the data to train on, or a part of it such as train[:10%].",
          type="str"),
    _data("dataset_test_split", "test", "Split of the data to evaluate on.", type="str"),
    _data("eval_dataset_name", None, "Evaluation data: a file, a folder or a Hub id. Unset: dataset_test_split of "
          "dataset_name.", type="str", optional=True, common=True, needs="eval_strategy=steps or epoch"),
    _data("dataset_streaming", False, "Read a Hub dataset row by row, without storing it.", type="bool"),
    _data("datasets", [], "Mixture of datasets: a list in a recipe, each with path, and optionally name, split, "
          "fraction, data_files, data_dir and columns. Replaces dataset_name.", type="records"),
    _data("streaming", False, "Read the Hub datasets of a mixture row by row.", type="bool", needs="datasets"),
    _data("test_split_size", None, "Part of a mixture to evaluate on: a fraction below 1, or a number of rows.",
          type="float", optional=True, low=0, needs="datasets"),
    _data("ignore_bias_buffers", False, "", type="bool", status="refused", reason="only trl's own scripts use it. "
          "Leave it out."),
)  # fmt: skip

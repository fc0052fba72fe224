"""What `--gpu-policy` leaves out, and why. All other tests are to pass with a GPU's dtypes, packed weights and
operations as they do with the CPU's.

Beside these, what is marked slow: MLX's CPU takes seconds for a row of the real model in half precision.
"""

from __future__ import annotations

from collections.abc import Mapping

# Names of files, without test_ and .py, or of single tests in them.
LEFT_OUT: Mapping[str, str] = {
    "no model computes there": """
        blas combine config fast figures gpu_policy growing html lattice links listing packaging pages
        paths phrase_view phrases pruning readings run sandbox schedules selection stops strategies
        studies terminal text tokenizer tokenizer_chat tokenizer_sources usage web_build weights_download weights_files
        weights_fuzz weights_manage weights_safetensors widths""",
    "the computing is done by processes of their own, which are not told": """
        commands_of_docs docs gpu_check other_clients scale sentences server server_clients server_connections
        server_docs server_early_exit server_fuzz server_load server_models server_openai server_probabilities
        server_security server_sessions server_tongues server_tools tutorial""",
    "it is timed": "bench speed",
    "it is the rule itself, asked for every device with its own bounds": """
        precision memory::test_a_model_that_does_not_fit_is_not_loaded
        local_models::test_memory_is_that_of_this_device""",
    "on a GPU one request has its passes begun ahead and shares none, of which there is a test": """
        server_batching::test_a_request_among_many_answers_as_alone
        server_batching::test_what_prompts_have_in_common_is_run_once""",
    "a file's weights are held against its own numbers, and a GPU's are requantised or in 16 bits": """
        llama_cpp weights_gemma_gguf::test_logits_agree""",
}
NAMES = frozenset(" ".join(LEFT_OUT.values()).split())


def left_out(file: str, test: str) -> bool:
    return file in NAMES or f"{file}::{test}" in NAMES

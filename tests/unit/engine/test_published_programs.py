"""What the published programs compute where golden/ leaves it open: numbers of plain loops written after them."""

from __future__ import annotations

import pytest

from shared.sampling_params import resolve_params
from tests.unit.engine.conftest import GetEngine
from tests.unit.engine.golden_cases import Asked

CASES = [
    Asked(
        "an end token of the first forward with a cache",
        "llada_gqa",
        [112, 272, 335, 280, 12, 136, 170, 70, 449, 182, 21, 437, 19, 161, 153, 379],
        {
            "stop_token_ids": [240],
            "max_tokens": 32,
            "diffusion": {"cache": "prefix", "block_length": 16, "algorithm": "factor", "factor": 2.0},
        },
        [287, 36, 421, 43, 388, 29, 199, 36],
        None,
    ),
    Asked(
        "credit: equals within 1e-5",
        "llada",
        [
            476, 384, 7, 152, 44, 339, 143, 302, 388, 234, 415, 114, 340, 260, 381, 187, 228, 220, 79, 191, 420,
            472, 285, 314, 362, 183, 209, 218, 225, 27, 367, 101, 117, 123, 131, 251, 71, 247, 409, 51, 218, 58,
            421, 408, 110, 428, 177, 290, 15, 472, 399, 8, 465, 408, 102, 465, 218, 352, 385, 97, 2, 173, 350,
            175, 404, 206,
        ],
        {
            "max_tokens": 48,
            "diffusion": {"algorithm": "credit", "threshold": 0.9, "block_length": 24, "credit_alpha": 0.7},
        },
        [
            98, 268, 207, 30, 367, 216, 457, 439, 490, 490, 404, 247, 457, 193, 466, 121, 404, 215, 511, 511,
            317, 69, 129, 41, 70, 453, 138, 42, 367, 20, 131, 329, 268, 135, 131, 20, 417, 234, 388, 421, 121,
            445, 506, 162, 152, 495, 129, 506,
        ],
        None,
    ),
    Asked(
        "editing without a threshold",
        "llada2_moe",
        [250, 478, 451],
        {
            "max_tokens": 48,
            "top_k": 5,
            "diffusion": {
                "algorithm": "joint_threshold",
                "threshold": 0.9081279260373849,
                "edit_threshold": 0.0,
                "max_post_edit_steps": 1,
                "tokens_per_step": 2,
                "block_length": 2,
            },
        },
        [
            403, 435, 114, 499, 203, 435, 38, 485, 422, 223, 382, 91, 283, 157, 372, 27, 372, 253, 27, 223, 297,
            422, 14, 150, 335, 404, 398, 163, 1, 198, 27, 504, 396, 73, 335, 361, 188, 268, 221, 345, 424, 315,
            311, 20, 353, 258, 88, 50,
        ],
        50,
    ),
    Asked(
        "equals where guidance makes confidences 1",
        "llada",
        [241, 403, 249, 427, 311, 1, 136, 117, 52, 15, 332, 451, 110, 371, 113, 253, 176, 112],
        {
            "max_tokens": 32,
            "diffusion": {
                "algorithm": "low_confidence", "steps": 32, "block_length": 16, "cache": "none",
                "cfg_scale": 3.0, "suppress_end": "logits", "suppress_token_ids": [397],
            },
        },
        [
            38, 229, 465, 413, 317, 163, 331, 373, 175, 309, 447, 428, 330, 115, 425, 403, 216, 330, 283, 389,
            254, 409, 415, 219, 219, 389, 252, 169, 103, 219, 219, 511,
        ],
        32,
    ),
    Asked(
        "equals in a block where top_k is 1",
        "sdar",
        [
            281, 191, 336, 217, 231, 114, 264, 317, 29, 205, 204, 97, 251, 344, 304, 259, 302, 250, 314, 43, 50,
            108, 436, 437, 59, 450, 7, 80, 296, 167, 62, 252,
        ],
        {
            "max_tokens": 7, "top_k": 1,
            "diffusion": {"algorithm": "low_confidence_static", "denoising_steps": 6, "block_length": 4},
        },
        [282, 496, 356, 281, 385, 124, 332],
        8,
    ),
    Asked(
        "equals in a short block where top_k is 1",
        "sdar",
        [
            1, 293, 55, 34, 205, 434, 263, 360, 93, 77, 331, 327, 82, 408, 436, 54, 308, 304, 6, 325, 98, 152,
            173, 193, 415, 99, 216, 98, 256, 119, 42, 476, 71, 404, 439, 266, 292, 230, 50, 65,
        ],
        {
            "max_tokens": 21, "top_k": 1, "stop_token_ids": [440, 234],
            "diffusion": {"algorithm": "low_confidence_static", "denoising_steps": 2, "block_length": 5},
        },
        [252, 252, 489, 205, 508, 218, 472, 162, 311, 287, 168, 86],
        6,
    ),
    Asked(
        "equals where masks and edits share a block",
        "llada2_moe",
        [
            330, 274, 309, 319, 33, 310, 15, 97, 267, 221, 53, 157, 126, 241, 473, 467, 3, 150, 226, 388, 124,
            16, 198, 288, 217, 12, 380, 63, 470, 115, 365, 470, 137, 413, 305, 376, 90, 15, 342, 334, 235, 329,
            1, 116, 169, 123,
        ],
        {
            "max_tokens": 48, "top_k": 1,
            "diffusion": {
                "algorithm": "joint_threshold", "threshold": 1.0, "edit_threshold": 0.9, "max_post_edit_steps": 16,
                "tokens_per_step": 1, "block_length": 8,
            },
        },
        [
            248, 190, 121, 289, 112, 273, 456, 175, 121, 121, 468, 393, 286, 173, 117, 320, 211, 197, 318, 211,
            497, 478, 218, 34, 171, 393, 468, 13, 210, 498, 201, 260, 498, 495, 44, 391, 100, 345, 14, 482, 220,
            345, 249, 396, 455, 445, 107, 495,
        ],
        162,
    ),
    Asked(
        "equals where top_p leaves one token",
        "dream",
        [381],
        {
            "max_tokens": 32, "top_p": 0.9,
            "diffusion": {"algorithm": "topk_margin", "steps": 19},
        },
        [
            113, 379, 497, 26, 203, 203, 103, 508, 350, 203, 497, 115, 45, 459, 280, 497, 243, 203, 497, 353,
            389, 462, 217, 462, 304, 253, 327, 16, 253, 456, 435, 385,
        ],
        None,
    ),
    Asked(
        "equals where top_k is 1",
        "dream",
        [440],
        {
            "max_tokens": 64, "top_k": 1,
            "diffusion": {"algorithm": "topk_margin", "steps": 2},
        },
        [
            288, 420, 420, 420, 420, 420, 420, 420, 420, 420, 420, 420, 420, 420, 420, 420, 37, 503, 420, 420,
            503, 146, 146, 146, 37, 420, 420, 146, 146, 503, 420, 420, 200, 468, 10, 10, 468, 468, 206, 468,
            468, 327, 468, 468, 314, 314, 468, 327, 327, 314, 314, 78, 78, 280, 327, 327, 78, 468, 468, 61, 61,
            61, 200, 200,
        ],
        None,
    ),
]  # fmt: skip


@pytest.mark.parametrize("one", CASES, ids=[one.id for one in CASES])
def test_tokens_and_forwards(engine_of: GetEngine, one: Asked) -> None:
    engine = engine_of(one.family)
    fields = {"temperature": 0, "ignore_eos": True, **one.fields}
    params = resolve_params(fields, card=engine.card, prompt_tokens=len(one.prompt))
    output = engine.submit(one.id, one.prompt, params).result(60).outputs[0]
    assert output.token_ids == one.wanted
    assert one.forwards is None or output.forwards == one.forwards

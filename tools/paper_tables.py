"""What the paper (arXiv 2505.08561) reports, for the columns "reported, not measured here" of tools/compare_runs.py.

Tables 1, 2 and 9: {data set: {(method, mask ratio): {column: figure}}}; tables 3, 5 and 6: {flags: {their values:
{column: figure}}}. top-1 and top-5 in %; memory in GB at ViT-B, 16 x 224 x 224, batch 32; error: reconstruction
error on UCF101.
"""

METHODS = ("tube", "adamae", "tats")  # VideoMAE, AdaMAE, the paper's own


def _by_ratio(rows: dict[str, str]) -> dict[tuple, dict[str, float]]:
    """{mask ratio: "top-1/top-5 ..." of METHODS} -> {(method, ratio): {column: figure}}."""
    return {
        (method, float(ratio)): dict(zip(("top-1", "top-5"), map(float, pair.split("/")), strict=True))
        for ratio, text in rows.items()
        for method, pair in zip(METHODS, text.split(), strict=True)
    }


TABLE1 = {
    "UCF101": _by_ratio({
        "0.85": "80.36/94.95 83.98/96.37 85.94/96.98",
        "0.9": "76.64/94.29 82.42/95.84 84.53/96.37",
        "0.95": "65.86/89.14 80.83/95.26 81.75/95.29",
    }),
    "HMDB51": _by_ratio({
        "0.85": "40.82/71.61 41.28/73.37 41.60/73.31",
        "0.9": "36.39/69.73 39.13/72.33 41.28/73.76",
        "0.95": "33.98/65.36 37.70/70.38 38.67/72.01",
    }),
    "K400": _by_ratio({
        "0.85": "42.26/68.28 38.97/64.68 43.24/68.76",
        "0.9": "41.79/68.62 39.50/65.70 43.28/68.85",
        "0.95": "39.73/66.15 39.42/65.14 41.70/67.29",
    }),
    "SSv2": _by_ratio({
        "0.85": "37.63/66.47 37.92/66.63 39.96/68.10",
        "0.9": "37.85/66.86 38.10/66.29 40.79/69.30",
        "0.95": "37.24/65.92 38.38/67.11 40.25/68.73",
    }),
}  # fmt: skip

TABLE2 = {
    "K400 to UCF101": _by_ratio({
        "0.85": "84.91/96.51 85.49/96.93 86.94/97.67",
        "0.9": "84.41/96.25 84.98/96.48 86.23/97.27",
        "0.95": "82.40/95.80 84.03/96.50 85.17/96.77",
    }),
    "K400 to HMDB51": _by_ratio({
        "0.85": "55.60/82.55 55.79/84.44 60.81/84.44",
        "0.9": "56.71/83.07 56.45/82.49 60.42/83.59",
        "0.95": "53.26/79.75 54.10/81.25 58.14/82.62",
    }),
    "K400 to SSv2": _by_ratio({
        "0.85": "36.42/65.50 36.72/65.72 38.39/66.47",
        "0.9": "35.70/64.46 36.62/65.27 39.46/67.25",
        "0.95": "34.11/62.64 36.88/65.64 38.13/66.48",
    }),
    "SSv2 to UCF101": _by_ratio({
        "0.85": "84.88/96.91 84.98/96.72 87.16/97.38",
        "0.9": "83.88/96.75 84.64/97.06 86.81/97.51",
        "0.95": "82.53/95.90 84.38/96.21 85.14/97.11",
    }),
    "SSv2 to HMDB51": _by_ratio({
        "0.85": "54.82/82.03 55.47/82.81 59.64/84.83",
        "0.9": "55.92/83.40 55.86/84.31 60.35/85.42",
        "0.95": "52.41/80.14 54.69/84.18 58.40/83.59",
    }),
}  # fmt: skip

TABLE9 = {"SSv2": _by_ratio({"0.95": "59.38/84.17 63.06/85.89 65.82/88.50"})}

# by: (flags, {values: figures})
TABLE3 = {
    ("tats_attention",): {
        ("mha",): {"top-1": 81.59, "memory": 25.37},
        ("orthoformer",): {"top-1": 81.75, "memory": 25.36},
    },
    ("decoder_depth",): {
        (1,): {"top-1": 81.46, "memory": 16.54},
        (2,): {"top-1": 80.83, "memory": 19.48},
        (4,): {"top-1": 81.75, "memory": 25.36},
        (8,): {"top-1": 79.10, "memory": 37.13},
    },
    ("loss", "normalize_target"): {
        ("l1", True): {"top-1": 81.51},
        ("l1", False): {"top-1": 81.41},
        ("mse", True): {"top-1": 81.75},
        ("mse", False): {"top-1": 81.61},
    },
    ("tats_blocks",): {
        (1,): {"top-1": 81.75, "memory": 25.36},
        (2,): {"top-1": 65.17, "memory": 32.18},
        (3,): {"top-1": 67.35, "memory": 39.00},
    },
}
TABLE5 = {
    ("tats_start_epoch", "tats_rollout_steps"): {
        (0, 1): {"error": 0.5211}, (1, 1): {"error": 0.5205}, (5, 1): {"error": 0.5304}, (10, 1): {"error": 0.5135},
        (25, 1): {"error": 0.5269}, (100, 1): {"error": 0.6662}, (50, 5): {"error": 0.7735},
        (50, 10): {"error": 0.8149}, (50, 25): {"error": 0.9201},
    }
}  # fmt: skip
TABLE6 = {  # one row is printed twice there, (1e-3, 1e-3, 1e-4) with 0.5215 and with 0.7869: neither is taken over
    ("policy_coef", "value_coef", "entropy_coef"): {
        (1e-4, 1e-3, 1e-3): {"error": 0.5188}, (1e-4, 1e-3, 1e-4): {"error": 0.5167},
        (1e-4, 1e-4, 1e-3): {"error": 0.5246}, (1e-3, 1e-4, 1e-4): {"error": 0.8482},
        (1e-4, 1e-4, 1e-4): {"error": 0.5135}, (1e-5, 1e-4, 1e-4): {"error": 0.5239},
        (1e-5, 1e-5, 1e-5): {"error": 0.5173},
    }
}  # fmt: skip

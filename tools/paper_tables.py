"""The figures that the paper (arXiv 2505.08561) reports, by the flags that reach its settings here.

tube is its VideoMAE, and its trajectory attention (TA) is the Orthoformer, as it says of its practice.
"""

from collections import defaultdict

METHODS = ("tube", "adamae", "tats")
# The flags that a table's rows differ in; table 3 is several tables in one.
ABLATIONS = (("tats_attention",), ("decoder_depth",), ("loss", "normalize_target"), ("tats_blocks",))
BY = {
    "table1": (("mask_type", "mask_ratio"),),
    "table2": (("mask_type", "mask_ratio"),),
    "table3": ABLATIONS,
    "table5": (("tats_start_epoch", "tats_rollout_steps"),),
    "table6": (("policy_coef", "value_coef", "entropy_coef"),),
    "table9": (("mask_type", "mask_ratio"),),
}
DATA_SETS = {"table1": ("UCF101", "HMDB51", "K400", "SSv2"), "table5": ("UCF101", "HMDB51")}
ABOUT = {
    "table1": "fine-tuning after 400 epochs of pre-training on the small-scale set",
    "table2": "transfer, small-scale pre-training",
    "table3": "TATS on UCF101, mask ratio 0.95, memory at 32 clips a GPU",
    "table5": "lowest reconstruction error of TATS by (e, k)",
    "table6": "lowest reconstruction error of TATS on UCF101 by (c_p, c_v, c_e)",
    "table9": "pre-training and fine-tuning on the whole of SSv2",
}

# ratio: top-1 and top-5 of each of METHODS
TABLE1 = {
    "UCF101": {
        0.85: (80.36, 94.95, 83.98, 96.37, 85.94, 96.98),
        0.90: (76.64, 94.29, 82.42, 95.84, 84.53, 96.37),
        0.95: (65.86, 89.14, 80.83, 95.26, 81.75, 95.29),
    },
    "HMDB51": {
        0.85: (40.82, 71.61, 41.28, 73.37, 41.60, 73.31),
        0.90: (36.39, 69.73, 39.13, 72.33, 41.28, 73.76),
        0.95: (33.98, 65.36, 37.70, 70.38, 38.67, 72.01),
    },
    "K400": {
        0.85: (42.26, 68.28, 38.97, 64.68, 43.24, 68.76),
        0.90: (41.79, 68.62, 39.50, 65.70, 43.28, 68.85),
        0.95: (39.73, 66.15, 39.42, 65.14, 41.70, 67.29),
    },
    "SSv2": {
        0.85: (37.63, 66.47, 37.92, 66.63, 39.96, 68.10),
        0.90: (37.85, 66.86, 38.10, 66.29, 40.79, 69.30),
        0.95: (37.24, 65.92, 38.38, 67.11, 40.25, 68.73),
    },
}
TABLE2 = {  # (pre-trained on, fine-tuned on)
    ("K400", "UCF101"): {
        0.85: (84.91, 96.51, 85.49, 96.93, 86.94, 97.67),
        0.90: (84.41, 96.25, 84.98, 96.48, 86.23, 97.27),
        0.95: (82.40, 95.80, 84.03, 96.50, 85.17, 96.77),
    },
    ("K400", "HMDB51"): {
        0.85: (55.60, 82.55, 55.79, 84.44, 60.81, 84.44),
        0.90: (56.71, 83.07, 56.45, 82.49, 60.42, 83.59),
        0.95: (53.26, 79.75, 54.10, 81.25, 58.14, 82.62),
    },
    ("K400", "SSv2"): {
        0.85: (36.42, 65.50, 36.72, 65.72, 38.39, 66.47),
        0.90: (35.70, 64.46, 36.62, 65.27, 39.46, 67.25),
        0.95: (34.11, 62.64, 36.88, 65.64, 38.13, 66.48),
    },
    ("SSv2", "UCF101"): {
        0.85: (84.88, 96.91, 84.98, 96.72, 87.16, 97.38),
        0.90: (83.88, 96.75, 84.64, 97.06, 86.81, 97.51),
        0.95: (82.53, 95.90, 84.38, 96.21, 85.14, 97.11),
    },
    ("SSv2", "HMDB51"): {
        0.85: (54.82, 82.03, 55.47, 82.81, 59.64, 84.83),
        0.90: (55.92, 83.40, 55.86, 84.31, 60.35, 85.42),
        0.95: (52.41, 80.14, 54.69, 84.18, 58.40, 83.59),
    },
}
TABLE9 = {0.95: (59.38, 84.17, 63.06, 85.89, 65.82, 88.50)}
TABLE3 = {  # top-1, top-5, training memory in GB
    ("tats_attention",): {("mha",): (81.59, 95.29, 25.37), ("orthoformer",): (81.75, 95.42, 25.36)},
    ("decoder_depth",): {
        (1,): (81.46, 95.07, 16.54),
        (2,): (80.83, 95.02, 19.48),
        (4,): (81.75, 95.29, 25.36),
        (8,): (79.10, 94.68, 37.13),
    },
    ("loss", "normalize_target"): {
        ("l1", True): (81.51, 95.58),
        ("l1", False): (81.41, 95.02),
        ("mse", True): (81.75, 95.29),
        ("mse", False): (81.61, 95.14),
    },
    ("tats_blocks",): {(1,): (81.75, 95.29, 25.36), (2,): (65.17, 88.59, 32.18), (3,): (67.35, 90.20, 39.00)},
}
TABLE5 = {  # (e, k): UCF101, HMDB51
    (0, 1): (0.5211, 0.8051),
    (1, 1): (0.5205, 0.8195),
    (5, 1): (0.5304, 0.8535),
    (10, 1): (0.5135, 0.8278),
    (25, 1): (0.5269, 0.8987),
    (100, 1): (0.6662, 0.9291),
    (50, 5): (0.7735, 0.9772),
    (50, 10): (0.8149, 0.9776),
    (50, 25): (0.9201, None),
}
TABLE6 = (  # the row (1e-3, 1e-3, 1e-4) is printed twice, with two errors
    ((1e-4, 1e-3, 1e-3), 0.5188),
    ((1e-4, 1e-3, 1e-4), 0.5167),
    ((1e-4, 1e-4, 1e-3), 0.5246),
    ((1e-3, 1e-4, 1e-4), 0.8482),
    ((1e-4, 1e-4, 1e-4), 0.5135),
    ((1e-5, 1e-4, 1e-4), 0.5239),
    ((1e-3, 1e-3, 1e-4), 0.5215),
    ((1e-3, 1e-3, 1e-4), 0.7869),
    ((1e-5, 1e-5, 1e-5), 0.5173),
)
WORDS = {"K400": ("k400", "kinetics"), "SSv2": ("ssv2", "something"), "UCF101": ("ucf101",), "HMDB51": ("hmdb51",)}


def data_set_of(path):
    """The data set that the last telling part of a path names, or None."""
    for part in reversed(path.lower().split("/")):
        for name, words in WORDS.items():
            if any(word in part for word in words):
                return name
    return None


def reported(table, by, data_set):
    """{(values of the flags by, pre-trained on, fine-tuned on): {"top-1": [figures], ...}}; one figure each, two where
    the paper has two. The data sets are None but in table 2. by: one of BY[table]."""
    if table in ("table1", "table9"):
        return _methods({(None, None): TABLE1[data_set] if table == "table1" else TABLE9})
    if table == "table2":
        return _methods(TABLE2)
    if table == "table3":
        names = ("top-1", "top-5", "memory (GB)")
        return {
            (values, None, None): {name: [figure] for name, figure in zip(names, figures, strict=False)}
            for values, figures in TABLE3[by].items()
        }
    column = DATA_SETS["table5"].index(data_set) if table == "table5" else None
    pairs = TABLE6 if table == "table6" else [(values, errors[column]) for values, errors in TABLE5.items()]
    errors = defaultdict(lambda: {"error": []})
    for values, error in pairs:
        errors[values, None, None]["error"] += [] if error is None else [error]
    return dict(errors)


def _methods(tables):
    return {
        ((method, ratio), *sets): {"top-1": [figures[2 * i]], "top-5": [figures[2 * i + 1]]}
        for sets, ratios in tables.items()
        for ratio, figures in ratios.items()
        for i, method in enumerate(METHODS)
    }

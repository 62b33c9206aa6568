"""The package: name, version, dependencies, entry point and the kernels/ mapping."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="beit-fast",
    version="0.1.0",
    description="BEiT pre-training and backbones, built for throughput",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    packages=[
        *find_packages(include=["beit_fast", "beit_fast.*"]),
        "beit_fast.kernels",
        *(f"beit_fast.kernels.{room}" for room in find_packages("kernels")),
    ],
    py_modules=["beit_fast_main"],
    package_dir={"beit_fast.kernels": "kernels"},
    package_data={"beit_fast.data": ["photographs/*"]},
    install_requires=[
        "torch>=2.11",  # tensors, SDPA, fused AdamW with tensor lr; tested: 2.11.0 and 2.15.0
        "torchvision",  # transforms v2 on uint8, colour jitter on PIL images, image grids
        "numpy",
        "safetensors",  # weight files that can hold no code
        "huggingface-hub",  # published checkpoints, push_to_hub
        "scipy",  # interpolating cubic spline for relative-position tables
        "timm>=1.0.20",  # parameter groups, EMA of the weights, the operations of RandAugment
        "torchcodec>=0.17",  # JPEG decode in threads; earlier versions corrupt memory on CUDA
        "pillow",  # every other image format, and the reference transform
        "grain>=0.2.18",  # order, shuffle, split over ranks, prefetch threads, exact resume
        "jsonargparse[signatures]>=4.49",  # the command line, generated from the dataclasses
        "rich",  # progress
        "tensorboard",  # event logs
        "matplotlib",  # curves
    ],
    extras_require={
        "fp8": ["torchao>=0.18"],  # run.precision fp8
        "onnx": ["onnxscript>=0.7"],  # torch.onnx.export; 0.8 MB, brings onnx (9 MB)
        "cloud": [
            "obstore>=0.9",  # S3, GCS, Azure, HTTP: many requests at once from few threads
            "fsspec",  # the schemes that obstore lacks
        ],
        "jpeg": ["simplejpeg>=1.9"],  # decodes JPEGs faster, to the same bits; 0.4 MB
        "tables": ["pyarrow>=21"],  # Parquet and Arrow files of images
        "test": [
            "pytest",
            "pytest-benchmark",  # bench/test_kernels.py
            "pytest-xdist",  # tests on several cores
            "ruff",
            "setuptools>=70.1",  # the build back end: a wheel is tested; older ones need wheel
            "torchmetrics",  # oracle of segmentation's measures: IoU, accuracy, confusion
            "scikit-learn",  # oracle of the probes: nearest neighbours, logistic regression
            "transformers>=5.17",  # numerical peer, as is timm
            "torchao>=0.18",  # the extra fp8
            "onnxscript>=0.7",  # the extra onnx, whose evaluator is the peer
            "obstore>=0.9",  # the extra cloud
            "fsspec",
            "pyarrow>=21",  # the extra tables
            "simplejpeg>=1.9",  # the extra jpeg
            "webdataset",  # reads the shards that we write
        ],
    },
    entry_points={"console_scripts": ["beit-fast=beit_fast_main:main"]},
)

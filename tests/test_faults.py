"""Faults planted in folds are caught, and correct folds raise no alarm.

By default small networks and few layers: `pytest -m slow tests/test_faults.py` plants in all
architectures, and `python tests/faults_table.py` also counts.
"""

from __future__ import annotations

import copy
import os

import pytest
import timm
import torch
import torchvision
from faults import ARCHITECTURES, KINDS, SHIFT, Fault, fold_of, planted, severity
from hypothesis import HealthCheck, Phase, assume, find, given, settings
from randomise import randomise, settle
from torch import Tensor, nn

import bntools
from bntools.depth import compare_layers
from bntools.planning import compiled_of
from bntools.surgery.folding import fold_copy
from bntools.verifying import Reference

"""The default run as a whole: minutes long."""

import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from sklearn.datasets import load_digits
from sklearn.svm import SVC


@pytest.mark.slow
def test_a_classifier_of_real_digits_sees_all_ten_in_the_samples(environment, tmp_path):
    """Trained by the default command; 1,000 samples; each class is 3 % of them or more, most are near a real one."""

    def run(*command):
        done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    run("train.py", f"--workdir={tmp_path}")
    run("sample.py", f"--workdir={tmp_path}", "--num=1000", "--batch-size=250", "--steps=250", f"--out={tmp_path}/out")
    samples = np.load(tmp_path / "out" / "samples.npz")["images"].reshape(1000, 64) / 255

    real, labels = load_digits(return_X_y=True)
    real = real / 16
    counts = np.bincount(SVC().fit(real, labels).predict(samples), minlength=10)
    assert counts.min() >= 30, counts

    def nearest(points):
        """The distance of each point to the nearest real digit other than itself."""
        distances = np.sqrt(np.maximum(0, (points**2).sum(1)[:, None] + (real**2).sum(1) - 2 * points @ real.T))
        return np.sort(distances, 1)[:, 1 if points is real else 0]

    assert np.mean(nearest(samples) < np.quantile(nearest(real), 0.99)) > 0.7

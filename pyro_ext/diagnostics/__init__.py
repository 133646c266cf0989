"""Look at a finished run, and hold posteriors of any engine to account."""

from .conversion import deterministic_values as deterministic_values
from .conversion import to_arviz as to_arviz
from .coverage import ExpectedCoverage as ExpectedCoverage
from .coverage import central_coverage as central_coverage
from .coverage import expected_coverage as expected_coverage
from .coverage import highest_density_coverage as highest_density_coverage
from .plots import plot_coverage as plot_coverage
from .plots import plot_predictive_check as plot_predictive_check
from .plots import plot_ranks as plot_ranks
from .predictive import PredictiveCheck as PredictiveCheck
from .predictive import posterior_predictive_check as posterior_predictive_check
from .ranks import RankCalibration as RankCalibration
from .ranks import calibration_of_ranks as calibration_of_ranks
from .ranks import rank_statistics as rank_statistics
from .simulation_based import simulation_based_calibration as simulation_based_calibration
from .two_sample import ClassifierTest as ClassifierTest
from .two_sample import classifier_two_sample_test as classifier_two_sample_test

__all__ = [
    "ClassifierTest",
    "ExpectedCoverage",
    "PredictiveCheck",
    "RankCalibration",
    "calibration_of_ranks",
    "central_coverage",
    "classifier_two_sample_test",
    "deterministic_values",
    "expected_coverage",
    "highest_density_coverage",
    "plot_coverage",
    "plot_predictive_check",
    "plot_ranks",
    "posterior_predictive_check",
    "rank_statistics",
    "simulation_based_calibration",
    "to_arviz",
]

"""The tests that mutations are tried on: those of seconds first."""

REPLAY = ("tests/wiring/test_replay.py",)
RESUME = ("tests/wiring/test_resume.py",)
TWO = ("tests/wiring/test_two_processes.py::test_two_processes_do_what_one_does",)
LEARNING = ("tests/wiring/test_learning.py",)
RANDOMNESS = ("tests/wiring/test_randomness.py",)
SAMPLERS = ("tests/wiring/test_samplers.py",)
EVALUATION = ("tests/wiring/test_evaluation.py",)
FAULTS = ("tests/wiring/test_faults.py",)
OPENSORA = ("tests/wiring/test_opensora.py",)
ZERO = (
    "tests/distributed/test_zero.py::test_a_process_without_a_pair_takes_part",
    "tests/distributed/test_deepspeed_settings.py",
)
BITS = ("tests/distributed/test_zero.py::test_a_resumed_run_has_the_bits_of_one_that_went_on",)
DIVISIONS = ("tests/distributed/test_zero.py::test_a_run_goes_on_with_another_division_of_the_work",)
DISK = ("tests/runs/test_checkpoint_durability.py", "tests/runs/test_checkpoint.py")

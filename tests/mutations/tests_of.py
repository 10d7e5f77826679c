"""The tests that mutations are tried on: those of seconds first."""

REPLAY = ("tests/wiring/test_replay.py",)
RESUME = ("tests/wiring/test_resume.py",)
TWO = ("tests/wiring/test_two_processes.py",)
LEARNING = ("tests/wiring/test_learning.py",)
RANDOMNESS = ("tests/wiring/test_randomness.py",)
SAMPLERS = ("tests/wiring/test_samplers.py",)
EVALUATION = ("tests/wiring/test_evaluation.py",)
FAULTS = ("tests/wiring/test_faults.py",)
OPENSORA = ("tests/wiring/test_opensora.py",)
DISK = ("tests/runs/test_checkpoint_durability.py", "tests/runs/test_checkpoint.py")

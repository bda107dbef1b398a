"""What the process that `tests.support.processes` forks from has imported: the trainers, with all that they import."""

import fdiv.alignment
import fdiv.rl
import fdiv.unlearning

TRAINERS = (fdiv.alignment.FDPOTrainer, fdiv.alignment.D2OTrainer, fdiv.alignment.FDPGTrainer)
TRAINERS += (fdiv.rl.DPHTrainer, fdiv.unlearning.FLATTrainer)

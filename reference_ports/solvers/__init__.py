"""Solvers: how a diffusion model gets from noise to a sample. See README.md."""

from reference_ports.solvers.config import (
    CLASSES as CLASSES,
)
from reference_ports.solvers.config import (
    SOLVERS as SOLVERS,
)
from reference_ports.solvers.config import (
    Recipe as Recipe,
)
from reference_ports.solvers.config import (
    class_of as class_of,
)
from reference_ports.solvers.config import (
    from_config as from_config,
)
from reference_ports.solvers.config import (
    parameters_from_config as parameters_from_config,
)
from reference_ports.solvers.consistency import (
    LCM as LCM,
)
from reference_ports.solvers.consistency import (
    TCD as TCD,
)
from reference_ports.solvers.consistency import (
    ConsistencyParameters as ConsistencyParameters,
)
from reference_ports.solvers.consistency import (
    TCDParameters as TCDParameters,
)
from reference_ports.solvers.ddim import DDIM as DDIM
from reference_ports.solvers.ddim import DDIMParameters as DDIMParameters
from reference_ports.solvers.ddpm import DDPM as DDPM
from reference_ports.solvers.ddpm import DDPMParameters as DDPMParameters
from reference_ports.solvers.dpm import (
    DPMMultistep as DPMMultistep,
)
from reference_ports.solvers.dpm import (
    DPMMultistepParameters as DPMMultistepParameters,
)
from reference_ports.solvers.dpm import (
    DPMSingleStep as DPMSingleStep,
)
from reference_ports.solvers.dpm import (
    DPMSingleStepParameters as DPMSingleStepParameters,
)
from reference_ports.solvers.dpm import (
    DPMState as DPMState,
)
from reference_ports.solvers.euler import (
    Euler as Euler,
)
from reference_ports.solvers.euler import (
    EulerAncestral as EulerAncestral,
)
from reference_ports.solvers.euler import (
    EulerAncestralParameters as EulerAncestralParameters,
)
from reference_ports.solvers.euler import (
    EulerParameters as EulerParameters,
)
from reference_ports.solvers.flow_euler import FlowEuler as FlowEuler
from reference_ports.solvers.flow_euler import FlowEulerParameters as FlowEulerParameters
from reference_ports.solvers.parameters import Parameters as Parameters
from reference_ports.solvers.pndm import PNDM as PNDM
from reference_ports.solvers.pndm import PNDMParameters as PNDMParameters
from reference_ports.solvers.pndm import PNDMState as PNDMState
from reference_ports.solvers.solver import OrderedState as OrderedState
from reference_ports.solvers.solver import Solver as Solver
from reference_ports.solvers.solver import State as State
from reference_ports.solvers.two_calls import (
    KDPM2 as KDPM2,
)
from reference_ports.solvers.two_calls import (
    Heun as Heun,
)
from reference_ports.solvers.two_calls import (
    HeunParameters as HeunParameters,
)
from reference_ports.solvers.two_calls import (
    KDPM2Ancestral as KDPM2Ancestral,
)
from reference_ports.solvers.two_calls import (
    KDPM2Parameters as KDPM2Parameters,
)
from reference_ports.solvers.two_calls import (
    TwoCallState as TwoCallState,
)
from reference_ports.solvers.unipc import UniPC as UniPC
from reference_ports.solvers.unipc import UniPCParameters as UniPCParameters
from reference_ports.solvers.unipc import UniPCState as UniPCState

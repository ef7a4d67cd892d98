"`python -m ppo_ddpm` is the command `ppo-ddpm`."
import sys

from ppo_ddpm.engine.commands import main

if __name__ == "__main__": sys.exit(main())

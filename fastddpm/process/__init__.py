"""The diffusion process: schedules, timesteps, solvers, and the tables that they make."""

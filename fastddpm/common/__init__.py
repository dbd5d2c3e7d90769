"""What every room uses: arguments, terminals, progress, interrupts."""

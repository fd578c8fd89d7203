from ctrak_lightning.cli import main

main()

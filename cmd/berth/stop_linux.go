package main

import (
	"errors"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/berth-net/berth/internal/control"
)

func newStopCommand() *cobra.Command {
	var to target
	var req control.StopRequest
	cmd := &cobra.Command{
		Use:   "stop [NAME]",
		Short: "Drain the service and end it",
		Long:  `Let no new connection in, wait until nothing is in flight, stop the program and end berth. Returns when all is gone.`,
		Example: `  berth stop
  berth stop web --force`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			client, err := to.dial(args)
			if err != nil {
				return err
			}
			if err := client.Stop(cmd.Context(), req); err != nil {
				return failed(err, "")
			}
			// The keeper takes the socket's file away last.
			for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
				if _, err := os.Stat(client.Path()); errors.Is(err, os.ErrNotExist) {
					return nil
				}
			}
			return failed(errors.New("the service has ended but berth has not"), "")
		},
	}
	to.flags(cmd)
	cmd.Flags().BoolVar(&req.Force, "force", false, "kill at once, drain nothing")
	return cmd
}

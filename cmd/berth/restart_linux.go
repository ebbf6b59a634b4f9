package main

import (
	"errors"
	"fmt"
	"os"

	"github.com/google/shlex"
	"github.com/spf13/cobra"

	"github.com/berth-net/berth/internal/control"
)

func newRestartCommand() *cobra.Command {
	var to target
	var req control.RestartRequest
	var command string
	cmd := &cobra.Command{
		Use:   "restart [NAME] [flags] [-- COMMAND [ARG…]]",
		Short: "Start the program again and lose nothing",
		Long: `Start a new generation of the program, wait until it is ready, send all new connections to it, and stop the old one once
nothing is in flight on it. Prints what it cost. If the new one fails, the old one goes on serving, and the exit status is 1.

A restart that is asked for while another runs waits for its turn; with --supersede it takes the other's place, unless that
has got to steering already.`,
		Example: `  berth restart
  berth restart web -- ./server-v2 --port 8080`,
		DisableFlagsInUseLine: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			if at := cmd.ArgsLenAtDash(); at >= 0 {
				req.Command = args[at:]
				args = args[:at]
				if len(req.Command) == 0 {
					return usage("", "there is no command after --")
				}
			}
			if len(args) > 1 {
				return usage("put a new command after --", "%d names are given, one is wanted", len(args))
			}
			if cmd.Flags().Changed("command") {
				words, err := shlex.Split(command)
				if err != nil || len(words) == 0 {
					return usage("write it as for a shell: --command 'java -jar app.jar'", "--command %q is no command", command)
				}
				if req.Command != nil {
					return usage("", "both --command and a command after -- are given")
				}
				req.Command = words
			}
			client, err := to.dial(args)
			if err != nil {
				return err
			}
			entry, err := client.Restart(cmd.Context(), req)
			if err != nil {
				return failed(err, "")
			}
			if entry.Error != "" {
				for _, line := range entry.Output {
					fmt.Fprintln(os.Stderr, "  |", line)
				}
				return failed(errors.New(entry.String()), "what served before goes on serving")
			}
			if req.NoWait {
				fmt.Printf("%s %d: generation %d serves; %d drains\n", entry.Cause, entry.Number, entry.To, entry.From)
			} else {
				fmt.Println(entry)
			}
			return nil
		},
	}
	to.flags(cmd)
	cmd.Flags().BoolVar(&req.NoWait, "no-wait", false, "return once the new generation serves, not when the old one is gone")
	cmd.Flags().BoolVar(&req.Supersede, "supersede", false, "take the place of a restart that runs")
	cmd.Flags().StringVar(&command, "command", "", "replace the service's command for good, `'COMMAND ARG…'` in one word (or put it after --)")
	return cmd
}

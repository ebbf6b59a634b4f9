//go:build !linux

package main

import (
	"errors"
	"fmt"
	"runtime"

	"github.com/spf13/cobra"
)

func child() bool { return false }

// errLinux is returned by what stands on Linux's seccomp, pidfd and reuseport groups.
var errLinux = errors.New("needs Linux 5.15 or newer")

func serviceCommands() []*cobra.Command {
	var commands []*cobra.Command
	for _, c := range [][2]string{
		{"run", "Hold the port and run a program on it"}, {"restart", "Start the program again and lose nothing"},
		{"status", "Show generations, queues and what each restart cost"}, {"stop", "Drain the service and end it"},
		{"demo", "See it: a server restarted ten times under load"},
	} {
		commands = append(commands, &cobra.Command{
			Use: c[0], Short: c[1] + " (Linux only)", DisableFlagParsing: true,
			RunE: func(cmd *cobra.Command, _ []string) error {
				return failed(fmt.Errorf("%s %w; this is %s", cmd.CommandPath(), errLinux, runtime.GOOS), "`berth load` works here")
			},
		})
	}
	return commands
}
